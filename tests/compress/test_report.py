"""compress/report.py: the summary table, from facts as a run leaves them."""

from __future__ import annotations

from typing import Any

from diffpress.compress.report import summary


def facts(**changed: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "bundle": {"denoiser_mib": 7.0, "size_ratio": 0.25},
        "baseline": {"denoiser_mib": 28.0},
        "components": {},
        "history": [],
        "engines": [],
        "variants": {},
        "evaluation": None,
        "latency": None,
        "bench": None,
    }
    return plain | changed


def score(**changed: Any) -> dict[str, Any]:
    spread = {"mean": 0.5, "sd": 0.01}
    plain: dict[str, Any] = {
        "samples": 64,
        "seeds": 3,
        "frechet": spread | {"floor": 0.1},
        "kid": spread,
        "paired": None,
        "label_accuracy": None,
    }
    return plain | changed


def test_quantized_components_have_their_size_and_their_effect_on_the_image() -> None:
    found = summary(
        facts(
            components={
                "text_encoder": {"mib": 2.0, "baseline_mib": 8.0, "precision": "int8", "image_psnr_db": 41.25},
                "vae_decoder": {"mib": 2.5, "baseline_mib": 2.5, "precision": "fp32"},
            }
        )
    )
    text = next(line.split() for line in found.splitlines() if line.startswith("text_encoder.onnx"))
    assert text[2:] == ["8.00", "2.00", "0.250"]
    assert any(line.strip().startswith("image PSNR with it in int8") and "41.2" in line for line in found.splitlines())
    assert sum("image PSNR" in line for line in found.splitlines()) == 1


def test_prompt_adherence_is_shown_for_both_and_absent_from_older_runs() -> None:
    scores = {"clip_score": {"mean": 31.0, "sd": 0.1}, "retrieval": {"mean": 0.81, "sd": 0.02, "candidates": 1140}}
    found = summary(facts(evaluation={"baseline": score(**scores), "bundle": score(**scores)}))
    row = next(line for line in found.splitlines() if line.startswith("retrieval accuracy among 1140 texts"))
    assert row.count("0.810 ± 0.020") == 2
    del scores["retrieval"]
    older = summary(facts(evaluation={"baseline": score(**scores), "bundle": score(**scores)}))
    assert "CLIP score" in older and "retrieval" not in older
