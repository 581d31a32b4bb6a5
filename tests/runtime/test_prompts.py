"""runtime/prompts.py: tokens against transformers, assembled inputs against arrays written by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from diffpress.runtime.conditioning import Conditioning, TextEncoder, TextInput
from diffpress.runtime.errors import InvalidInputError, MissingDependencyError
from diffpress.runtime.prompts import assemble, encode, open_tokenizer, tokenize, unconditional

ROOT = Path(__file__).parents[2]
INT32, INT64 = np.dtype(np.int32), np.dtype(np.int64)
SIZE = (64, 96)  # height, width
LENGTH = 12

CORPUS = ["a red cat on a blue mat", "The Old Lighthouse by the sea, photo", "two dogs, one tree: 3 apples!"] * 3
PROMPTS = [
    "",
    " ",
    "a red cat",
    "A RED Cat On THE MAT",
    "  leading and   inner\twhite \n space  ",
    "naïve café, Ångström, e\u0301 against é",
    "雪山下的小木屋 夜の港 🦊",
    "3 apples, 12 trees & 1 sea; it's the lighthouse's photo!",
    "a red cat on a blue mat by the sea " * 8,
    "<|endoftext|> a cat </s> <pad> dog",
    "supercalifragilisticexpialidocious",
    "x",
]

# SDXL's two encoders, concatenated, and its vectors, in small sizes
SDXL = Conditioning(
    kind="text",
    encoders=(
        TextEncoder("text_encoder", "tokenizer", 4),
        TextEncoder("text_encoder_2", "tokenizer_2", 4),
    ),
    inputs={
        "encoder_hidden_states": TextInput((4, 5), (("text_encoder.hidden", "text_encoder_2.hidden"),)),
        "text_embeds": TextInput((3,), (("text_encoder_2.pooled",),)),
        "time_ids": TextInput((6,), (("size", "corner", "size"),)),
    },
    zero_negative=True,
)


def outputs(count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {
        "text_encoder.hidden": (4, 2),
        "text_encoder_2.hidden": (4, 3),
        "text_encoder_2.pooled": (3,),
        "text_encoder_3.hidden": (6, 7),
    }
    named = {name: rng.standard_normal((count, *shape)).astype(np.float32) for name, shape in shapes.items()}
    return {**named, "text_encoder.attention_mask": np.array([[1, 1, 0, 0]] * count)}


def one_input(shape: tuple[int, ...], *rows: tuple[str, ...] | int) -> Conditioning:
    return Conditioning(kind="text", inputs={"states": TextInput(shape, rows)})


# --- assemble: needs no tokenizer


def test_pieces_of_a_row_are_concatenated_along_the_features() -> None:
    pieces = outputs(2)
    result = assemble(SDXL, pieces, 2, SIZE)
    assert list(result) == ["encoder_hidden_states", "text_embeds", "time_ids"]
    np.testing.assert_array_equal(result["encoder_hidden_states"][:, :, :2], pieces["text_encoder.hidden"])
    np.testing.assert_array_equal(result["encoder_hidden_states"][:, :, 2:], pieces["text_encoder_2.hidden"])
    np.testing.assert_array_equal(result["text_embeds"], pieces["text_encoder_2.pooled"])
    np.testing.assert_array_equal(result["time_ids"], [[64, 96, 0, 0, 64, 96]] * 2)
    assert all(array.dtype == np.float32 for array in result.values())


def test_rows_are_concatenated_along_the_sequence_and_narrow_ones_padded() -> None:
    """SD3: CLIP's hidden states, concatenated and padded to T5's width, then T5's; without T5, rows of zeros."""
    pieces = outputs(2)
    clip, t5 = ("text_encoder.hidden", "text_encoder_2.hidden"), ("text_encoder_3.hidden",)
    states = assemble(one_input((10, 7), clip, t5), pieces, 2, SIZE)["states"]
    np.testing.assert_array_equal(states[:, :4, 2:5], pieces["text_encoder_2.hidden"])
    np.testing.assert_array_equal(states[:, :4, 5:], np.zeros((2, 4, 2)))
    np.testing.assert_array_equal(states[:, 4:], pieces["text_encoder_3.hidden"])
    without = assemble(one_input((10, 7), clip, 6), pieces, 2, SIZE)["states"]
    np.testing.assert_array_equal(without[:, :4], states[:, :4])
    np.testing.assert_array_equal(without[:, 4:], np.zeros((2, 6, 7)))


def test_masks_and_rows_of_zeros_work_alone() -> None:
    mask = assemble(one_input((4,), ("text_encoder.attention_mask",)), outputs(3), 3, SIZE)["states"]
    np.testing.assert_array_equal(mask, [[1, 1, 0, 0]] * 3)
    assert mask.dtype == np.float32
    np.testing.assert_array_equal(assemble(one_input((4, 3), 4), {}, 3, SIZE)["states"], np.zeros((3, 4, 3)))


def test_half_precision_outputs_become_float32() -> None:
    halves = {name: array.astype(np.float16) for name, array in outputs(1).items()}
    assert assemble(SDXL, halves, 1, SIZE)["encoder_hidden_states"].dtype == np.float32


@pytest.mark.parametrize(
    ("shape", "rows", "message"),
    [
        (
            (5, 2),
            [("text_encoder.hidden",)],
            r"'states' is declared as \(5, 2\) per sample, but its rows give \(4, 2\)",
        ),
        (
            (4, 1),
            [("text_encoder.hidden",)],
            r"'states' is declared as \(4, 1\) per sample, but its rows give \(4, 2\)",
        ),
        ((9, 2), [("text_encoder.hidden",), 4], r"rows give \(4, 2\) / \(4, 2\)"),
        ((4,), [("text_encoder_2.pooled",)], r"declared as \(4,\) per sample, but its rows give \(3,\)"),
        ((3,), [("text_encoder_2.pooled",)] * 2, "'states' has no sequence .* one row"),
        ((3,), [3], "'states' has no sequence .* one row"),
        ((4, 2), [], "'states' has no rows"),
        ((4, 2), [()], "'states' .* cannot be assembled from nothing"),
        ((4, 3), [("text_encoder_2.pooled",)], r"'states' .* cannot be assembled from text_encoder_2.pooled \(2, 3\)"),
        (
            (4, 9),
            [("text_encoder.hidden", "text_encoder_3.hidden")],
            r"cannot be assembled from .*\(2, 4, 2\).*\(2, 6, 7\)",
        ),
        ((4, 2), [("text_encoder.hiden",)], "piece of input 'states', 'text_encoder.hiden': did you mean 'text_enc"),
    ],
)
def test_an_input_that_cannot_be_assembled_is_named(shape: tuple[int, ...], rows: list[Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        assemble(one_input(shape, *rows), outputs(2), 2, SIZE)


def test_outputs_for_another_number_of_samples_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="for 3 samples"):
        assemble(SDXL, outputs(2), 3, SIZE)


# --- encode and unconditional: with a tokenizer of one token per letter


class Letters:
    """Fake tokenizer: 'b' -> 2, ...; 1 is the final special token, `enable_truncation` truncates before it."""

    def num_special_tokens_to_add(self, _: bool) -> int:
        return 1

    def get_added_tokens_decoder(self) -> dict[int, SimpleNamespace]:
        return {}

    def no_padding(self) -> None:
        pass

    def enable_truncation(self, length: int) -> None:
        self.room = length - 1

    def encode(self, text: str) -> SimpleNamespace:
        ids = [ord(letter) - 96 for letter in text]
        lost = [(at, at + 1) for at in range(self.room, len(text))]
        overflow = SimpleNamespace(offsets=[*lost, (0, 0)], special_tokens_mask=[0] * len(lost) + [1])
        return SimpleNamespace(ids=[*ids[: self.room], 1], overflowing=[overflow] if lost else [])


class FakeEncoder:
    """hidden[n, l, :] = id, pooled[n, :] = sum of ids; records its calls."""

    def __init__(self, width: int, **inputs: np.dtype) -> None:
        self.width, self.inputs = width, {"input_ids": INT64, **inputs}
        self.calls: list[dict[str, np.ndarray]] = []

    def run_all(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.calls.append(inputs)
        ids = inputs["input_ids"]
        hidden = np.repeat(ids[..., None], self.width, axis=-1).astype(np.float32)
        return {"hidden": hidden, "pooled": hidden.sum(axis=1)}


@pytest.fixture
def pair() -> dict[str, FakeEncoder]:
    return {"text_encoder": FakeEncoder(2), "text_encoder_2": FakeEncoder(3, attention_mask=INT32)}


LETTERS: Any = {"tokenizer": Letters(), "tokenizer_2": Letters()}


def test_each_prompt_is_encoded_into_its_own_rows(pair: Any) -> None:
    result = encode(["bc", "", "d"], SDXL, pair, LETTERS, SIZE)
    ids = np.array([[2, 3, 1, 0], [1, 0, 0, 0], [4, 1, 0, 0]])
    np.testing.assert_array_equal(result["encoder_hidden_states"], np.repeat(ids[..., None], 5, axis=-1))
    np.testing.assert_array_equal(result["text_embeds"], [[6] * 3, [1] * 3, [5] * 3])
    np.testing.assert_array_equal(result["time_ids"], [[64, 96, 0, 0, 64, 96]] * 3)


def test_graphs_get_their_own_dtypes_and_only_their_own_inputs(pair: Any) -> None:
    pair["text_encoder"].inputs = {"input_ids": INT32}
    encode(["bc"], SDXL, pair, LETTERS, SIZE)
    (first,), (second,) = pair["text_encoder"].calls, pair["text_encoder_2"].calls
    assert set(first) == {"input_ids"} and first["input_ids"].dtype == np.int32
    assert set(second) == {"input_ids", "attention_mask"}
    assert (second["input_ids"].dtype, second["attention_mask"].dtype) == (np.int64, np.int32)
    assert second["attention_mask"].tolist() == [[1, 1, 1, 0]]


def test_a_denoiser_can_take_the_mask_of_an_encoder_that_takes_none(pair: Any) -> None:
    masked = replace(SDXL, inputs={"mask": TextInput((4,), (("text_encoder.attention_mask",),))})
    assert encode(["bc", ""], masked, pair, LETTERS, SIZE)["mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]


def test_equal_prompts_are_encoded_once_and_never_more_than_eight_at_a_time(pair: Any) -> None:
    prompts = [letter for letter in "qponmlkjihgfedcb" for _ in range(3)] + ["q", "r", "b"]
    result = encode(prompts, SDXL, pair, LETTERS, SIZE)
    assert [len(call["input_ids"]) for call in pair["text_encoder"].calls] == [8, 8, 1]
    assert result["encoder_hidden_states"][:, 0, 0].tolist() == [ord(prompt) - 96 for prompt in prompts]
    for number, prompt in enumerate(prompts):
        alone = encode([prompt], SDXL, pair, LETTERS, SIZE)
        assert all((alone[name][0] == array[number]).all() for name, array in result.items())


def test_lower_also_strips_whitespace() -> None:
    encoder = TextEncoder("text_encoder", "tokenizer", 4, lower=True)
    assert tokenize(LETTERS["tokenizer"], [" BC\n"], encoder).ids.tolist() == [[2, 3, 1, 0]]


def test_no_prompts_give_empty_inputs(pair: Any) -> None:
    assert encode([], SDXL, pair, LETTERS, SIZE)["encoder_hidden_states"].shape == (0, 4, 5)
    assert pair["text_encoder"].calls == []


def test_a_truncated_prompt_gives_one_warning_for_all_encoders(pair: Any, caplog: pytest.LogCaptureFixture) -> None:
    result = encode(["bcdefg", "b", "bcdefg"], SDXL, pair, LETTERS, SIZE)
    (message,) = caplog.messages
    assert message == "the prompt 'bcdefg' is too long for text_encoder, text_encoder_2 (4 tokens): left out 'efg'"
    assert result["encoder_hidden_states"][0, :, 0].tolist() == [2, 3, 4, 1]


def test_the_warning_is_one_line_of_bounded_length(pair: Any, caplog: pytest.LogCaptureFixture) -> None:
    encode(["b\n" * 400], SDXL, pair, LETTERS, SIZE)
    (message,) = caplog.messages
    assert "\n" not in message and len(message) < 400


def test_an_encoder_with_other_inputs_is_refused(pair: Any) -> None:
    pair["text_encoder_2"].inputs["token_type_ids"] = INT64
    with pytest.raises(
        InvalidInputError, match="text_encoder_2: its inputs are input_ids, attention_mask, token_type_ids"
    ):
        encode(["b"], SDXL, pair, LETTERS, SIZE)


def test_without_a_negative_prompt_text_is_zero_but_sizes_stay(pair: Any) -> None:
    result = unconditional(None, 3, SDXL, pair, LETTERS, SIZE)
    prompted = encode(["b"] * 3, SDXL, pair, LETTERS, SIZE)
    assert {name: array.shape for name, array in result.items()} == {n: a.shape for n, a in prompted.items()}
    assert list(result) == list(prompted)
    assert not result["encoder_hidden_states"].any() and not result["text_embeds"].any()
    np.testing.assert_array_equal(result["time_ids"], prompted["time_ids"])
    assert len(pair["text_encoder"].calls) == 1  # for the prompt


def test_without_zero_negative_the_empty_prompt_is_encoded(pair: Any) -> None:
    result = unconditional(None, 2, replace(SDXL, zero_negative=False), pair, LETTERS, SIZE)
    for name, array in encode(["", ""], SDXL, pair, LETTERS, SIZE).items():
        np.testing.assert_array_equal(result[name], array)
    assert result["text_embeds"].any()


def test_negative_prompts_are_encoded_one_per_sample(pair: Any) -> None:
    result = unconditional(["b", ""], 2, SDXL, pair, LETTERS, SIZE)
    for name, array in encode(["b", ""], SDXL, pair, LETTERS, SIZE).items():
        np.testing.assert_array_equal(result[name], array)
    with pytest.raises(InvalidInputError, match="1 negative prompts for 2 samples"):
        unconditional(["b"], 2, SDXL, pair, LETTERS, SIZE)


# --- tokenizers of the library, against transformers


@pytest.fixture(scope="module")
def clip_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tokenizer.json like CLIP's: lower case, byte-level BPE with </w>, start and end tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    start, end = "<|startoftext|>", "<|endoftext|>"
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=end, end_of_word_suffix="</w>"))
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFC(), tokenizers.normalizers.Lowercase()]
    )
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "removed", invert=True)
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[start, end],
        end_of_word_suffix="</w>",
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    ids = {token: tokenizer.token_to_id(token) for token in (start, end)}
    tokenizer.post_processor = tokenizers.processors.RobertaProcessing(
        (end, ids[end]), (start, ids[start]), False, False
    )
    return save(tokenizer, tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def t5_like(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tokenizer.json like T5's: unigram, Metaspace word marks, an end token and no start token."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram())
    tokenizer.normalizer = tokenizers.normalizers.NFKC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.Metaspace()]
    )
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=80, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return save(tokenizer, tmp_path_factory.mktemp("t5"))


def save(tokenizer: Any, folder: Path) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def assert_same_tokens(file: Path, encoder: TextEncoder, oracle: Any, prepare: Callable[[str], str] = str) -> None:
    """Compare our ids and masks with those of `oracle`, a tokenizer of transformers."""
    tokens = tokenize(open_tokenizer(file), PROMPTS, encoder)
    texts = [prepare(prompt) for prompt in PROMPTS]
    expected = oracle(texts, padding="max_length", truncation=True, max_length=encoder.length, return_tensors="np")
    assert tokens.ids.dtype == tokens.mask.dtype == np.int64
    np.testing.assert_array_equal(tokens.ids, expected["input_ids"])
    np.testing.assert_array_equal(tokens.mask, expected["attention_mask"])
    untruncated = oracle(texts)["input_ids"]
    assert [bool(unread) for unread in tokens.unread] == [len(ids) > encoder.length for ids in untruncated]
    assert len({tuple(ids) for ids in untruncated}) >= len(untruncated) - 3  # the oracle distinguishes the prompts


@pytest.mark.parametrize("length", [2, 3, LENGTH, 77])
@pytest.mark.parametrize("pad_token", ["<|endoftext|>", "!"])
def test_clip_ids_and_masks_match_transformers(clip_like: Path, length: int, pad_token: str, tmp_path: Path) -> None:
    """SDXL's second tokenizer pads with '!', which the saved file makes a single token inside prompts as well."""
    transformers = pytest.importorskip("transformers")
    oracle = transformers.PreTrainedTokenizerFast(tokenizer_file=str(clip_like), pad_token=pad_token)
    oracle.save_pretrained(tmp_path)
    encoder = TextEncoder("text_encoder", "tokenizer", length, pad=oracle.pad_token_id)
    assert_same_tokens(tmp_path / "tokenizer.json", encoder, oracle)


def test_a_saved_cliptokenizer_tokenizes_as_in_transformers(clip_like: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = json.loads(clip_like.read_text(encoding="utf-8"))["model"]
    oracle = transformers.CLIPTokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    oracle.save_pretrained(tmp_path)
    assert_same_tokens(
        tmp_path / "tokenizer.json", TextEncoder("text_encoder", "tokenizer", LENGTH, oracle.pad_token_id), oracle
    )


@pytest.mark.parametrize("length", [1, 5, LENGTH, 120])
@pytest.mark.parametrize("lower", [False, True])
def test_t5_ids_and_masks_match_transformers(t5_like: Path, length: int, lower: bool) -> None:
    """`lower` matches the preprocessing in PixArt's pipeline."""
    transformers = pytest.importorskip("transformers")
    oracle = transformers.PreTrainedTokenizerFast(tokenizer_file=str(t5_like), pad_token="<pad>")
    encoder = TextEncoder("text_encoder", "tokenizer", length, lower=lower)
    assert_same_tokens(t5_like, encoder, oracle, (lambda text: text.lower().strip()) if lower else str)


def test_lower_changes_the_ids(t5_like: Path) -> None:
    plain = TextEncoder("text_encoder", "tokenizer", LENGTH)
    tokenizer = open_tokenizer(t5_like)
    upper, lower = (tokenize(tokenizer, ["The Old SEA"], replace(plain, lower=flag)).ids for flag in (False, True))
    assert (upper != lower).any()
    assert (lower == tokenize(tokenizer, ["the old sea"], plain).ids).all()


def test_padding_and_truncation_in_the_file_are_ignored(clip_like: Path, tmp_path: Path) -> None:
    tokenizer = open_tokenizer(clip_like)
    encoder = TextEncoder("text_encoder", "tokenizer", LENGTH, pad=7)
    expected = tokenize(tokenizer, PROMPTS, encoder)
    tokenizer.enable_truncation(5, stride=2, strategy="only_first", direction="left")
    tokenizer.enable_padding(direction="left", pad_id=3, length=40)
    found = tokenize(open_tokenizer(save(tokenizer, tmp_path)), PROMPTS, encoder)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.mask, expected.mask)
    assert found.unread == expected.unread


def test_one_tokenizer_can_serve_encoders_of_different_lengths(clip_like: Path) -> None:
    tokenizer = open_tokenizer(clip_like)
    short, long = (TextEncoder("text_encoder", "tokenizer", length) for length in (5, 77))
    first = tokenize(tokenizer, PROMPTS, short).ids
    assert tokenize(tokenizer, PROMPTS, long).ids.shape == (len(PROMPTS), 77)
    np.testing.assert_array_equal(tokenize(tokenizer, PROMPTS, short).ids, first)


def test_the_unread_text_is_the_end_of_the_prompt(clip_like: Path, t5_like: Path) -> None:
    prompt = "é a red cat on a blue mat, the old lighthouse"  # letters of 1 and 2 bytes: offsets count letters
    for file in (clip_like, t5_like):
        tokenizer = open_tokenizer(file)
        (unread,) = tokenize(tokenizer, [prompt], TextEncoder("text_encoder", "tokenizer", 9)).unread
        assert unread and prompt.endswith(unread)
        read = prompt.removesuffix(unread)
        assert len(tokenizer.encode(read).ids) == 9 and not tokenizer.encode(read).overflowing


def test_a_length_below_the_special_tokens_is_refused(clip_like: Path) -> None:
    with pytest.raises(InvalidInputError, match="text_encoder: 1 tokens, but its tokenizer alone adds 2 special ones"):
        tokenize(open_tokenizer(clip_like), ["a"], TextEncoder("text_encoder", "tokenizer", 1))


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff\xfe nothing"])
def test_an_invalid_tokenizer_file_is_named(content: bytes | None, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    file = tmp_path / "tokenizer.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InvalidInputError, match=r"tokenizer\.json: (no such file|not a tokenizer\.json)"):
        open_tokenizer(file)


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        MissingDependencyError, match=r"needs the package 'tokenizers': pip install 'diffpress\[text\]'"
    ):
        open_tokenizer("tokenizer.json")


def test_importing_prompts_does_not_import_tokenizers() -> None:
    code = "import sys, diffpress.runtime.prompts; print('tokenizers' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_many_truncated_prompts_give_one_warning(pair: Any, caplog: pytest.LogCaptureFixture) -> None:
    encode(["bcdefg", "b", "gfedcb"], SDXL, pair, LETTERS, SIZE)
    (message,) = caplog.messages
    assert message == (
        "the prompt 'bcdefg' and 1 more are too long for text_encoder, text_encoder_2 (4 tokens): "
        "left out 'efg' and so on"
    )


def test_a_tokenizer_whose_rules_fail_on_a_prompt_is_refused_in_one_line(tmp_path: Path) -> None:
    """The library gives up a regular expression that backtracks without end, with a panic of its Rust code."""
    tokenizers = pytest.importorskip("tokenizers")
    hostile = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "u": 1}, unk_token="u"))
    hostile.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("(a+)+$"), "isolated")
    hostile.save(str(tmp_path / "tokenizer.json"))
    tokenizer, encoder = open_tokenizer(tmp_path / "tokenizer.json"), TextEncoder("text_encoder", "tokenizer", 8)
    assert tokenize(tokenizer, ["a"], encoder).ids[0, 0] == 0
    with pytest.raises(InvalidInputError, match=r"text_encoder: its tokenizer fails on a prompt of 41 characters") as e:
        tokenize(tokenizer, ["a" * 40 + "!"], encoder)
    assert "\n" not in str(e.value)
