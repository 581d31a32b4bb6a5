"""The page's modules in Node: tokens are those of the Python tokenizer, noise is that of the Python runtime."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffpress.runtime.conditioning import TextEncoder
from diffpress.runtime.prompts import open_tokenizer, tokenize
from diffpress.runtime.sampler import noise_for

ICONS = Path(__file__).parents[4] / "calib_data" / "icons"
TOKENIZER = ICONS / "teacher" / "tokenizer" / "tokenizer.json"
PAGE = Path(str(files("diffpress.export.targets.web"))) / "page"
ALPHABET = "abcXYZ 019'\"!?.,-<>|éßΣİ日本🎨\u0301\u00a0\t\n\u200b\ufeff\u0085"
HARD = (
    *("", "  A  RED\u00a0house\u3000!", "it's we'll they're I'd 'S", "<|endoftext|> a <|startoftext|>cat"),
    *("Straße ΣΑΣ İstanbul", "日本語の文 🎨🎨 emoji", "e\u0301 café cafe\u0301", "123 4.5% x²", "''s !'s --'d"),
    *("a\tb\nc\x85d\ufeffe", "word " * 40, "\u0000\u0007x", "ﬁ ǅ", "a" * 200),
)


def in_node(module: str, code: str, given: Any = None) -> bytes:
    """Run a module of JavaScript with everything that a file of the page exports; returns what it writes."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("Node is not installed")
    source = f'import * as page from "{(PAGE / module).as_uri()}"; import fs from "node:fs"; {code}'
    command = [node, "--input-type=module", "-e", source]
    done = subprocess.run(command, input=json.dumps(given).encode(), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def tokens_of_the_page(file: Path, prompts: list[str], length: int, pad: int) -> list[dict[str, list[int]]]:
    code = f"""
        const encode = page.openTokenizer(JSON.parse(fs.readFileSync({json.dumps(str(file))})));
        const found = JSON.parse(fs.readFileSync(0)).map((prompt) => encode(prompt, {length}, {pad}));
        console.log(JSON.stringify(found, (key, value) => typeof value === "bigint" ? Number(value) :
            value instanceof BigInt64Array ? [...value].map(Number) : value));"""
    found: list[dict[str, list[int]]] = json.loads(in_node("tokenizer.js", code, prompts))
    return found


@pytest.mark.parametrize(("length", "pad"), [(16, 2077), (77, 0)])
def test_tokens_are_those_of_the_python_tokenizer(length: int, pad: int) -> None:
    generator = random.Random(0)
    prompts = [*(ICONS / "prompts.txt").read_text(encoding="utf-8").splitlines(), *HARD]
    prompts += ["".join(generator.choices(ALPHABET, k=generator.randint(0, 30))) for _ in range(1000)]
    encoder = TextEncoder("text_encoder", "tokenizer", length, pad)
    expected = tokenize(open_tokenizer(TOKENIZER), prompts, encoder)
    found = tokens_of_the_page(TOKENIZER, prompts, length, pad)
    for index, prompt in enumerate(prompts):
        assert found[index]["ids"] == expected.ids[index].tolist(), prompt
        assert found[index]["mask"] == expected.mask[index].tolist(), prompt
    assert len({tuple(entry["ids"]) for entry in found}) > 1000


@pytest.mark.parametrize("seed", [0, 7, 2**53 - 1])
def test_noise_is_that_of_the_python_runtime(seed: int) -> None:
    code = f"process.stdout.write(Buffer.from(page.noiseOf({seed}, 100000).buffer));"
    found = np.frombuffer(in_node("noise.js", code), np.float32)
    expected = noise_for([seed], (100_000,))[0]
    np.testing.assert_allclose(found, expected, rtol=3e-7)
    assert np.mean(found == expected) > 0.9999 and np.abs(found).max() > 3.6541528853610088, "the tail was drawn"
