"""When schedules are due, and what is made of it; runs are in test_schedule_tick.py."""

from collections import Counter
from datetime import UTC, date, datetime, timedelta
from itertools import chain, pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import build
from pipeline.errors import UsageError
from pipeline.orchestration.schedule import ON_TIME, Schedule, decide, due_times

ZONES = [
    "UTC",
    "Europe/Berlin",
    "America/New_York",
    "America/Havana",  # at midnight
    "Africa/Cairo",  # at midnight, and not every year
    "Africa/Casablanca",  # twice a year, around Ramadan
    "Australia/Lord_Howe",  # by half an hour
    "Pacific/Apia",  # left out a day
    "Asia/Kathmandu",
    "America/St_Johns",
]
MINUTE = timedelta(minutes=1)


def scheduled(cron, zone="UTC", **more):
    return Schedule(cron=cron, timezone=zone, run="verify out", **more)


def moment(text):
    return datetime.fromisoformat(text).astimezone(UTC)


def local(cron, zone, after, until):
    found = due_times(scheduled(cron, zone), moment(after), moment(until))
    return [due.astimezone(ZoneInfo(zone)).strftime("%d %H:%M %z") for due in found]


def changes(zone, years=range(2008, 2036)):
    """Days on which the clocks of a zone are changed."""
    zone, day, found = ZoneInfo(zone), timedelta(days=1), []
    now = datetime(years[0], 1, 1, tzinfo=UTC)
    while now.year <= years[-1]:
        if now.astimezone(zone).utcoffset() != (now + day).astimezone(zone).utcoffset():
            found.append(now)
        now += day
    return found


CHANGES = {zone: changes(zone) or [datetime(2020, 2, 28, tzinfo=UTC)] for zone in ZONES}


@st.composite
def clock_fields(draw, size):
    kind = draw(st.sampled_from(["*", "*/", "list", "list"]))
    if kind == "*":
        return "*", set(range(size))
    if kind == "*/":
        step = draw(st.integers(1, size - 1))
        return f"*/{step}", set(range(0, size, step))
    chosen = draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=4))
    return ",".join(map(str, sorted(chosen))), chosen


@st.composite
def crons(draw):
    """A cron expression of times in a day, with the minutes and hours that it means."""
    (minutes, m), (hours, h) = draw(clock_fields(60)), draw(clock_fields(24))
    return f"{minutes} {hours} * * *", m, h, not (minutes + hours).count("*")


def minute_by_minute(minutes, hours, fixed, zone, after, until):
    """Due times by looking at the clock on the wall each minute, as cron does."""
    found, shown, now = set(), set(), after - timedelta(days=2)
    wall = now.astimezone(zone).replace(tzinfo=None)
    while now < until:
        now += MINUTE
        before, wall = wall, now.astimezone(zone).replace(tzinfo=None)
        due = wall.minute in minutes and wall.hour in hours
        if fixed:
            due = due and wall not in shown
            shown.add(wall)
            if MINUTE < wall - before < timedelta(days=1):
                left_out = [before + MINUTE * n for n in range(1, (wall - before) // MINUTE)]
                due |= any(w.minute in minutes and w.hour in hours for w in left_out)
        if due and now > after:
            found.add(now)
    return sorted(found)


@given(cron=crons(), zone=st.sampled_from(ZONES), data=st.data())
@settings(max_examples=150)
def test_around_a_change_of_clocks_due_is_what_the_wall_clock_says(cron, zone, data):
    expression, minutes, hours, fixed = cron
    day = data.draw(st.sampled_from(CHANGES[zone]))
    after = day + data.draw(st.integers(-1440, 1440)) * MINUTE
    until = after + data.draw(st.integers(0, 2880)) * MINUTE
    found = list(due_times(scheduled(expression, zone), after, until))
    assert found == minute_by_minute(minutes, hours, fixed, ZoneInfo(zone), after, until)
    assert all(a < b for a, b in pairwise(found))


@given(cron=crons(), zone=st.sampled_from(ZONES), data=st.data())
@settings(max_examples=80)
def test_due_times_do_not_depend_on_when_one_looks(cron, zone, data):
    schedule = scheduled(cron[0], zone)
    start = data.draw(st.sampled_from(CHANGES[zone])) - timedelta(days=1)
    cuts = sorted(data.draw(st.lists(st.integers(0, 4 * 86_400), min_size=2, max_size=6)))
    times = [start + timedelta(seconds=cut) for cut in cuts]
    pieces = [list(due_times(schedule, a, b)) for a, b in pairwise(times)]
    assert list(chain(*pieces)) == list(due_times(schedule, times[0], times[-1]))


@given(
    zone=st.sampled_from(ZONES),
    year=st.integers(1995, 2060),
    hour=st.integers(0, 23),
    minute=st.integers(0, 59),
)
@settings(max_examples=60)
def test_a_daily_job_runs_once_on_every_day_that_there_is(zone, year, hour, minute):
    place = ZoneInfo(zone)
    after = datetime(year, 1, 1, tzinfo=place) - MINUTE
    until = datetime(year + 1, 1, 1, tzinfo=place) - MINUTE
    due = list(due_times(scheduled(f"{minute} {hour} * * *", zone), after, until))
    counted = Counter(each.astimezone(place).date() for each in due)
    days = (date(year, 1, 1) + timedelta(days=n) for n in range(366))
    there = {d for d in days if d.year == year and (zone, str(d)) != ("Pacific/Apia", "2011-12-30")}
    assert counted == Counter(there)


def test_a_time_that_is_left_out_is_due_right_after_the_gap():
    berlin = "Europe/Berlin", "2026-03-28T12:00+01:00", "2026-03-30T12:00+02:00"
    assert local("30 2 * * *", *berlin) == ["29 03:00 +0200", "30 02:30 +0200"]
    # Several such times, and one at the end of the gap, are one run.
    assert local("0,10,50 2,3 29 * *", *berlin) == [
        "29 03:00 +0200", "29 03:10 +0200", "29 03:50 +0200"]  # fmt: skip
    howe = "Australia/Lord_Howe", "2026-10-03T12:00+10:30", "2026-10-04T12:00+11:00"
    assert local("15 2 * * *", *howe) == ["04 02:30 +1100"]
    havana = "America/Havana", "2026-03-07T12:00-05:00", "2026-03-09T12:00-04:00"
    assert local("0 0 * * *", *havana) == ["08 01:00 -0400", "09 00:00 -0400"]


def test_a_time_that_comes_twice_is_due_once():
    berlin = "Europe/Berlin", "2026-10-24T12:00+02:00", "2026-10-26T12:00+01:00"
    assert local("30 2 * * *", *berlin) == ["25 02:30 +0200", "26 02:30 +0100"]
    havana = "America/Havana", "2026-10-31T12:00-04:00", "2026-11-02T12:00-05:00"
    assert local("0 0 * * *", *havana) == ["01 00:00 -0400", "02 00:00 -0500"]


@pytest.mark.parametrize("zone", ZONES)
def test_every_15_minutes_is_every_15_minutes(zone):
    for day in CHANGES[zone][:8]:
        due = list(due_times(scheduled("*/15 * * * *", zone), day, day + timedelta(days=2)))
        assert {b - a for a, b in pairwise(due)} == {15 * MINUTE}
        assert len(due) == 192


def test_of_a_day_that_is_left_out_nothing_is_due():
    apia = "Pacific/Apia", "2011-12-29T00:00-10:00", "2012-01-01T00:00+14:00"
    assert local("30 9 * * *", *apia) == ["29 09:30 -1000", "31 09:30 +1400"]
    assert local("0 */12 * * *", *apia) == [
        "29 12:00 -1000", "31 00:00 +1400", "31 12:00 +1400", "01 00:00 +1400"]  # fmt: skip


@given(year=st.integers(1990, 2190), zone=st.sampled_from(ZONES), hour=st.integers(0, 23))
@settings(max_examples=40)
def test_29_february_comes_in_leap_years(year, zone, hour):
    place = ZoneInfo(zone)
    after, until = (datetime(y, 1, 1, tzinfo=place) for y in (year, year + 9))
    due = due_times(scheduled(f"0 {hour} 29 2 *", zone), after, until)
    leap = [y for y in range(year, year + 9) if (y % 4 == 0 and y % 100 != 0) or y % 400 == 0]
    assert [each.astimezone(place).year for each in due] == leap
    assert 2100 not in leap


@given(year=st.integers(1995, 2110), zone=st.sampled_from(ZONES), day=st.integers(28, 31))
@settings(max_examples=40)
def test_months_end_where_they_end(year, zone, day):
    place = ZoneInfo(zone)
    after, until = (datetime(y, 1, 1, tzinfo=place) - MINUTE for y in (year, year + 1))
    first = [date(year, m, 1) for m in range(1, 13)] + [date(year + 1, 1, 1)]
    last = [b - timedelta(days=1) for a, b in pairwise(first)]

    def days(cron):
        found = due_times(scheduled(cron, zone), after, until)
        return [each.astimezone(place).date() for each in found]

    assert days(f"0 12 {day} * *") == [d.replace(day=day) for d in last if d.day >= day]
    assert days("0 12 L * *") == last


@pytest.mark.parametrize(
    ("cron", "days"),
    [
        ("0 0 13 * FRI", [1, 8, 13, 15, 22, 29]),  # either, where neither begins with *
        ("0 0 */2 * FRI", [1, 15, 29]),  # both, where one does
        ("0 0 * * FRI#2", [8]),
        ("0 0 * * 5L", [29]),
        ("0 0 LW * *", [29]),
    ],
)
def test_days_of_the_month_and_of_the_week(cron, days):
    due = due_times(scheduled(cron), moment("2026-04-30T23:59Z"), moment("2026-05-31T23:59Z"))
    assert [each.day for each in due] == days


BAD = {
    "six fields": ({"cron": "0 0 2 * * *"}, "five fields"),
    "no cron": ({"cron": "61 * * * *"}, "Bad minute"),
    "a name": ({"cron": "@daily"}, "five fields"),
    "30 February": ({"cron": "0 0 30 2 *"}, "Bad day-of-month"),
    "zone": ({"timezone": "Mars/Base"}, "no such time zone"),
    "zone folder": ({"timezone": "Europe"}, "no such time zone"),
    "zone path": ({"timezone": "../etc/passwd"}, "no such time zone"),
    "start without offset": ({"start": "2026-01-01T00:00:00"}, "timezone"),
    "deadline": ({"deadline": "soon"}, "90m"),
    "policy": ({"missed": "never"}, "'skip', 'run-once' or 'run-all'"),
    "policies": ({"missed": "run-all", "overlap": "replace"}, "choose one"),
    "unknown name": ({"every": "day"}, "every"),
    "empty": ({"run": ""}, "no command"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_schedule_that_does_not_hold_is_refused(case):
    wrong, message = BAD[case]
    with pytest.raises(UsageError, match=message):
        build(Schedule, {"cron": "0 2 * * *", "run": "verify out", **wrong})


NOW = datetime(2026, 5, 1, 12, 0, 30, tzinfo=UTC)
AGES = st.lists(st.integers(0, 30_000), unique=True, max_size=12)


@given(
    ages=AGES,
    missed=st.sampled_from(["skip", "run-once", "run-all"]),
    deadline=st.sampled_from([None, "30s", "10m", "2h"]),
)
def test_policies_for_missed_runs(ages, missed, deadline):
    due = sorted(NOW - timedelta(seconds=age) for age in ages)
    schedule = scheduled("* * * * *", missed=missed, deadline=deadline)
    decisions = decide(schedule, due, NOW, None)
    run = [each.due for each in decisions if each.run]
    # Each is accounted for, and none twice.
    assert sum(each.count for each in decisions) == len(due)
    assert all(each.count == 1 for each in decisions if each.run)
    assert [each.due for each in decisions] == sorted({each.due for each in decisions})
    limits = {None: timedelta.max, "30s": MINUTE / 2, "10m": 10 * MINUTE, "2h": 120 * MINUTE}
    limit = limits[deadline] if missed != "skip" else min(limits[deadline], ON_TIME)
    timely = [each for each in due if NOW - each <= limit]
    assert run == (timely if missed == "run-all" else timely[-1:])


@given(ages=AGES.filter(bool), missed=st.sampled_from(["skip", "run-once", "run-all"]))
def test_policies_for_overlapping_runs(ages, missed):
    due = sorted(NOW - timedelta(seconds=age) for age in ages)
    going = due[0] - MINUTE
    forbidden = decide(scheduled("* * * * *", missed=missed), due, NOW, going)
    assert not any(each.run for each in forbidden)
    # Either all are skipped, or all wait.
    assert sum(each.count for each in forbidden) == (0 if missed == "run-all" else len(due))
    allowed = scheduled("* * * * *", missed=missed, overlap="allow")
    assert decide(allowed, due, NOW, going) == decide(allowed, due, NOW, None)
