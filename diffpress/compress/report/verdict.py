"""The verdict of a run: one sentence, four numbers (faster, smaller, quality, integer share), and the gates.

A number that was not measured is None, with what would measure it. Speed is the ratio to the uncompressed model in the
same engine where a benchmark has it, then to PyTorch eager, then that of one step before and after quantization.
"""

from __future__ import annotations

from typing import Any

from diffpress.compress.evaluation.summary import spread
from diffpress.compress.report.figures import bundle_rows

# {"name", "label", "value": float or None, "text": the value as it is shown or None, "detail"}
Number = dict[str, Any]
FRECHET, PSNR, INTEGER = "quality: Fréchet distance", "quality: PSNR", "integer share"


def verdict_of(facts: dict[str, Any]) -> dict[str, Any]:
    """Return {"passed", "sentence", "numbers"}; `passed` is None for a run without gates."""
    numbers = [_faster(facts), _smaller(facts), _quality(facts), _integer(facts)]
    gates = facts["gates"] or []
    failed = [gate["gate"] for gate in gates if not gate["passed"]]
    passed = None if not gates else not failed
    speed, size, quality, _ = numbers
    parts = [part for part in (_speed_phrase(speed), _size_phrase(size), quality["phrase"]) if part]
    sentence = f"The bundle is {_listed(parts)}."
    if failed:
        sentence += f" It failed {len(failed)} of {len(gates)} gates: {', '.join(failed)}."
    elif gates:
        every = {1: "its gate", 2: "both gates"}.get(len(gates), f"all {len(gates)} gates")
        sentence += f" It passed {every}."
    shown = [{key: number[key] for key in ("name", "label", "value", "text", "detail")} for number in numbers]
    return {"passed": passed, "sentence": sentence, "numbers": shown}


def _number(
    name: str, value: float | None, text: str | None, detail: str, phrase: str = "", label: str | None = None
) -> Number:
    return {"name": name, "label": label or name, "value": value, "text": text, "detail": detail, "phrase": phrase}


def _ratio(name: str, opposite: str, value: float, detail: str, phrase: str = "") -> Number:
    """Return a ratio above 1; one below 1 is shown as its reciprocal under the opposite name."""
    label, shown = (name, value) if value >= 1.0 else (opposite, 1.0 / value)
    return _number(name, value, f"{shown:.1f}×", detail, phrase, label)


def _speed(value: float, detail: str, against: str) -> Number:
    return _ratio("faster", "slower", value, detail, against)


def _faster(facts: dict[str, Any]) -> Number:
    rows = bundle_rows(facts)
    if rows:
        row = min(rows, key=lambda row: (row["batch"], row["image_ms"]))
        same, torch = row["speedup_vs_same_engine"], row["speedup_vs_torch"]
        ms = row["image_ms"]
        where = f"{ms:{'.3g' if ms < 1000 else '.0f'}} ms per image in {row['engine']}, batch {row['batch']}"
        if same is not None:
            also = "" if torch is None else f"; {torch:.1f}× PyTorch eager"
            against = f"the teacher in {row['engine']}"
            return _speed(same, f"than {against}: {where}{also}", against)
        if torch is not None:
            return _speed(torch, f"than PyTorch eager: {where}", "PyTorch eager")
    steps = (facts["latency"] or {}).get("engines", [])
    if steps:
        row = min(steps, key=lambda row: row["latency_ratio"])
        speedup, against = 1.0 / row["latency_ratio"], f"its own float graph in {row['engine']}"
        return _speed(speedup, f"one step, {row['precision']} against {against}", against)
    return _number("faster", None, None, "not measured: write `diffpress bench --json` to bench.json here")


def _smaller(facts: dict[str, Any]) -> Number:
    parts = facts["components"].values()
    after = facts["bundle"]["denoiser_mib"] + sum(part["mib"] for part in parts)
    before = facts["baseline"]["denoiser_mib"] + sum(part["baseline_mib"] for part in parts)
    return _ratio("smaller", "larger", before / after, f"{after:.2f} of {before:.2f} MiB, all graphs")


def _quality(facts: dict[str, Any]) -> Number:
    scores = facts["evaluation"]
    if scores and scores["bundle"]["frechet"]:
        ours, theirs = scores["bundle"]["frechet"], scores["baseline"]["frechet"]
        ratio, real = ours["mean"] / theirs["mean"], theirs["floor"]
        against = f"{spread(ours)} against the teacher's {spread(theirs)}"
        if max(ours["mean"], theirs["mean"]) <= real:  # a ratio would compare noise with noise
            detail = f"{against}: neither is above that of real images, {real:.3f}"
            phrase = f"has a Fréchet distance of {spread(ours)}, not above that of real images ({real:.3f})"
            return _number("quality", 1.0, "1.00×", detail, phrase, FRECHET)
        floor = f"real images: {real:.3f}"
        if abs(ours["mean"] - theirs["mean"]) <= (ours["sd"] or 0.0) + (theirs["sd"] or 0.0):
            against += ", within the spread of the seeds"
        phrase = f"has a Fréchet distance of {against}"
        return _number("quality", ratio, f"{ratio:.2f}×", f"{against}; {floor}", phrase, FRECHET)
    if scores and scores["bundle"]["paired"]:
        psnr = scores["bundle"]["paired"]["psnr_db"]
        detail = "PSNR to the teacher's images, same plan and noise"
        return _number(
            "quality", psnr, f"{psnr:.1f} dB", detail, f"reaches {psnr:.1f} dB PSNR to the teacher's images", PSNR
        )
    return _number("quality", None, None, "not measured: add `evaluate` to the recipe")


def _integer(facts: dict[str, Any]) -> Number:
    entries = [entry for entry in facts["engines"] if entry.get("integer_mac_share") is not None]
    if not entries:
        return _number("integer", None, None, "not counted: no engine reports what it executed", label=INTEGER)
    timed = [row["engine"] for row in bundle_rows(facts)]
    entry = max(entries, key=lambda entry: (entry["engine"] in timed, entry["integer_mac_share"]))
    share, fallbacks = entry["integer_mac_share"], len(entry.get("fallbacks") or [])
    note = f"; {fallbacks} quantized layer{'s' * (fallbacks != 1)} ran in float" if fallbacks else ""
    detail = f"of the MACs ran on integers in {entry['engine']}{note}"
    return _number("integer", share, f"{100 * share:.1f} %", detail, label=INTEGER)


def _speed_phrase(number: Number) -> str:
    value = number["value"]
    if value is None:
        return ""
    if abs(value - 1.0) < 0.02:
        return f"as fast as {number['phrase']}"
    ratio, word = (value, "faster") if value > 1.0 else (1.0 / value, "slower")
    return f"{ratio:.1f} times {word} than {number['phrase']}"


def _size_phrase(number: Number) -> str:
    value = number["value"]
    if abs(value - 1.0) < 0.02:
        return "as large as the teacher"
    return f"{value:.1f} times smaller" if value > 1.0 else f"{1.0 / value:.1f} times larger"


def _listed(parts: list[str]) -> str:
    """Join the parts; the last one may have its own verb: 'A, B, and has C'."""
    *first, last = parts
    return f"{', '.join(first)}{', and ' if len(first) > 1 else ' and ' if first else ''}{last}"
