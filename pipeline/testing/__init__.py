"""Conformance suites for plug-in authors: what the rest of the system relies on, as functions.

Each raises ``AssertionError`` with a sentence that says which promise is broken:

    from pipeline.testing import check_source

    def test_my_source():
        check_source(MySource("tests/data"))
"""

from __future__ import annotations

from pipeline.testing.clusterers import check_clusterer
from pipeline.testing.formats import check_format
from pipeline.testing.pickled import pickled
from pipeline.testing.selectors import check_selector
from pipeline.testing.sources import check_source
from pipeline.testing.stages import check_stage
from pipeline.testing.stores import check_store
from pipeline.testing.tables import assert_same_rows
from pipeline.testing.tokenizers import check_tokenizer
from pipeline.testing.trees import tree_digest

__all__ = [
    "assert_same_rows",
    "check_clusterer",
    "check_format",
    "check_selector",
    "check_source",
    "check_stage",
    "check_store",
    "check_tokenizer",
    "pickled",
    "tree_digest",
]
