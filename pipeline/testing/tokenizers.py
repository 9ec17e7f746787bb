"""What every image tokenizer promises."""

from __future__ import annotations

from typing import Any

import torch

from pipeline.errors import UsageError


def check_tokenizer(tokenizer: Any, images: torch.Tensor) -> None:
    """Run every check of this module.

    Args:
        tokenizer: a :class:`~pipeline.tokenizers.tokenizer.Tokenizer` in evaluation mode.
        images: eight or more, uint8 (n, C, S, S), of its channels and size.

    Raises:
        AssertionError: a promise is broken; the message says which.
    """
    check_tokens(tokenizer, images)
    check_images(tokenizer, images)
    check_prefixes(tokenizer, images)
    check_parts(tokenizer, images)
    check_refusals(tokenizer, images)


def check_tokens(tokenizer: Any, images: torch.Tensor) -> None:
    """Tokens are of their form, and the same each time; bytes are all that there is to them."""
    tokens, form = tokenizer.encode(images), tokenizer.form
    assert tokens.pack() == tokenizer.encode(images).pack(), "a second encoding is another"
    floats = tokenizer.encode(images.float() / 255)
    assert tokens.pack() == floats.pack(), "bytes and floats in [0, 1] have other tokens"
    count = (len(images), form.max_tokens)
    if form.kind == "bits":
        assert tokens.values.shape == (*count, form.bits), "bits are of another shape"
        assert set(tokens.values.unique().tolist()) <= {0, 1}, "bits are 0 and 1"
    else:
        assert tokens.values.shape == count, "ids are of another shape"
        assert tokens.values.dtype == torch.int64, "ids are int64"
        assert int(tokens.values.min()) >= 0, "an id is negative"
        assert int(tokens.values.max()) < form.vocabulary, "an id is not below the vocabulary"
    cut = tokens.cut(torch.arange(len(images)) % form.max_tokens + 1)
    again = type(tokens).unpack(cut.pack(), cut.lengths, form)
    assert torch.equal(tokenizer.decode(again), tokenizer.decode(cut)), "bytes lose something"


def check_images(tokenizer: Any, images: torch.Tensor) -> None:
    """Decoded images are floats in [0, 1] of the size asked for, and follow their tokens."""
    tokens = tokenizer.encode(images)
    decoded = tokenizer.decode(tokens)
    assert decoded.shape == images.shape, "decoded images are of another shape"
    assert decoded.dtype == torch.float32, "decoded images are float32"
    assert 0 <= float(decoded.min()) <= float(decoded.max()) <= 1, "pixels are not in [0, 1]"
    swapped = type(tokens)(tokens.values.flip(0), tokens.lengths, tokens.form)
    assert torch.allclose(tokenizer.decode(swapped), decoded.flip(0), atol=1e-5), (
        "images do not follow their tokens"
    )
    if tokenizer.one_size:
        return
    side = tokenizer.size + tokenizer.multiple
    assert tokenizer.decode(tokens, (side, tokenizer.size)).shape[2:] == (side, tokenizer.size), (
        "images are not of the size that was asked for"
    )


def check_prefixes(tokenizer: Any, images: torch.Tensor) -> None:
    """Lengths mix in a batch, and what follows an image's length is not seen."""
    lengths = torch.arange(len(images)) % tokenizer.form.max_tokens + 1
    tokens = tokenizer.encode(images).cut(lengths)
    decoded = tokenizer.decode(tokens)
    kept = tokens.kept.reshape(*tokens.kept.shape, *[1] * (tokens.values.ndim - 2))
    other = type(tokens)(
        torch.where(kept, tokens.values, 1 - tokens.values.clamp(0, 1)), lengths, tokens.form
    )
    assert torch.equal(tokenizer.decode(other), decoded), "dropped tokens are seen"
    for row, length in enumerate(lengths.tolist()):
        alone = tokenizer.decode(tokens.cut(length))[row]
        assert torch.allclose(alone, decoded[row], atol=1e-5), "lengths do not mix in a batch"


def check_parts(tokenizer: Any, images: torch.Tensor) -> None:
    """It can be built anew, its digest says what it is, and its vectors are those of its tokens."""
    again = type(tokenizer).build(tokenizer.spec.config)
    again.load_state_dict(tokenizer.state_dict())
    again.eval()
    assert again.digest == tokenizer.digest, "its copy has another digest"
    assert again.encode(images).pack() == tokenizer.encode(images).pack(), "its copy differs"
    other = type(tokenizer).build(tokenizer.spec.config)
    assert other.digest != tokenizer.digest, "other weights have the same digest"
    vectors, form = tokenizer.token_vectors(), tokenizer.form
    rows = (2, form.bits) if form.kind == "bits" else (form.vocabulary,)
    assert tuple(vectors.shape[:-1]) == rows, "there is no vector for each token, or each bit"


def check_refusals(tokenizer: Any, images: torch.Tensor) -> None:
    """What does not fit is a :class:`~pipeline.errors.UsageError`."""
    channels, multiple = tokenizer.channels, tokenizer.multiple
    wrong = {"channels": images[:, :1].expand(-1, 4 - channels, -1, -1)}
    if multiple > 1:
        wrong["a side that is no multiple"] = images[..., 1:]
        wrong["a side shorter than a patch"] = images[..., : multiple - 1]
    for what, given in wrong.items():
        try:
            tokenizer.encode(given)
        except UsageError:
            continue
        raise AssertionError(f"images were taken with the wrong {what}")
