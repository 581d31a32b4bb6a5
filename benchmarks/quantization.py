"""Compare int8 with fp32 in each engine, and with NNCF's post-training quantization in OpenVINO, in one run.

    python benchmarks/quantization.py [teacher|cifar|dit ...] [--threads 2] [--repeats 15] [--batch 8] [--json FILE]

    teacher   the built-in teacher, under its own sampling plan
    cifar     a U-Net with the shape of DDPM's for CIFAR-10 (Ho et al. 2020), 35.7M, random weights
    dit       a class-conditional DiT with about the shape of DiT-S/2 (Peebles & Xie 2023), 35M, random weights

diffpress's int8 file and NNCF's int8 model are made from one fp32 ONNX file and calibrated on the same inputs: those of
diffpress's own calibration run are recorded and passed to NNCF. Both use 7-bit weights on processors without integer
dot products, as NNCF's documentation advises. NNCF's model runs in diffpress's OpenVINO engine, so shapes, threads and
precision hints are the same.

    step ms   one step of the plan at the batch size: median over rounds in which all subjects run in alternation
    PSNR      final samples against OpenVINO's in fp32, from the same noise, in the data range; mean over samples
    int MACs  integer MAC share: multiply-accumulates run on integers / all of them, layers kept in float included
    file      bytes relative to the fp32 ONNX file

Random networks are sampled as v-prediction models, which keeps their trajectory bounded. Their PSNR compares two
quantizations of one network and is no measure of image quality. Needs diffpress[compress,openvino] and
`pip install nncf`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from checks import check, check_line
from fitted_network import random_tensor

if TYPE_CHECKING:
    from diffpress.compress.checkpoint import Checkpoint
    from diffpress.runtime.engines import Engine
    from diffpress.runtime.engines.precision_report import PrecisionReport
    from diffpress.runtime.spec import DenoiserSpec

CIFAR: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
DIT: dict[str, Any] = {
    "sample_size": 32,
    "in_channels": 4,
    "out_channels": 8,  # noise and learned variance
    "patch_size": 2,
    "num_layers": 12,
    "num_attention_heads": 6,
    "attention_head_dim": 64,
    "num_embeds_ada_norm": 10,
}
RANDOM = {"cifar": ("UNet2DModel", "unet", CIFAR), "dit": ("DiTTransformer2DModel", "transformer", DIT)}
MODELS = ("teacher", *RANDOM)
TRANSFORMERS = ("dit",)
SCHEDULER = {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}

# random networks: steps of the plan, and calibration samples
RANDOM_STEPS, RANDOM_SAMPLES = 8, 8
PSNR_SAMPLES = {"teacher": 64, "cifar": 8, "dit": 8}
SEED = 7_000_000  # disjoint from the calibration seeds (compress/seeds.py)

DOT_PRODUCTS = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"}
Key = tuple[str, str]  # engine, model
Engines = dict[Key, "Engine"]
FLOAT, OURS, PEER = "fp32", "diffpress int8", "NNCF int8"
ENGINES = {"openvino": (FLOAT, OURS, PEER), "onnxruntime": (FLOAT, OURS)}
REFERENCE: Key = ("openvino", FLOAT)
OPENVINO_RATIO, ONNXRUNTIME_RATIO, INTEGER_SHARE, FILE_RATIO = 0.45, 0.70, 0.95, 0.28


def load_model(name: str, folder: Path) -> Checkpoint:
    from diffpress.compress.builtin import TEACHER
    from diffpress.compress.sources.load import load_checkpoint
    from diffpress.runtime.sampling_plan import make_plan

    if name == "teacher":
        return load_checkpoint(TEACHER)
    checkpoint = load_checkpoint(write_random(name, folder))
    plan = make_plan("ddim", RANDOM_STEPS, checkpoint.spec.schedule, clip=True)
    return checkpoint.evolve(spec=checkpoint.spec.with_plan(plan))


def write_random(name: str, folder: Path) -> Path:
    """Write a diffusers folder of the network with variance-preserving random weights; no layer is zero."""
    import diffusers
    import torch

    kind, component, config = RANDOM[name]
    model, generator = getattr(diffusers, kind)(**config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            tensor.copy_(random_tensor(key, tensor.shape, generator))
    model.save_pretrained(folder / component)
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    return folder


def make_files(name: str, checkpoint: Checkpoint, folder: Path) -> tuple[dict[str, Path], DenoiserSpec]:
    """Write the fp32 ONNX file, diffpress's int8 file and NNCF's int8 IR.

    Returns:
        The paths by precision, and the spec of diffpress's model, whose plan has the output correction.
    """
    from diffpress.compress.context import Context
    from diffpress.compress.models.torch_network import TorchNetwork
    from diffpress.compress.quantization.config import QuantizeConfig
    from diffpress.compress.quantization.quantize import quantize
    from diffpress.compress.seeds import CALIBRATION_SEED
    from diffpress.export.graph.model import save_graph
    from diffpress.export.graph.to_onnx import to_onnx
    from diffpress.export.lowering import PassContext, lower
    from diffpress.runtime.benchmarking.bench import RecordingNetwork
    from diffpress.runtime.sampler import generate

    files = {FLOAT: folder / "fp32.onnx", OURS: folder / "int8.onnx", PEER: folder / "nncf.xml"}
    graph = to_onnx(checkpoint.model, checkpoint.spec)
    save_graph(graph, files[FLOAT])
    samples: dict[str, Any] = {} if name == "teacher" else {"samples": RANDOM_SAMPLES, "batch": RANDOM_SAMPLES}
    config = QuantizeConfig(reduce_range=not has_dot_products(), **samples)
    context = Context(0, folder / "work", checkpoint)
    quantized = quantize(checkpoint, config, context)
    save_graph(lower(graph, "cpu", PassContext(quantized.quantization)), files[OURS])
    recording = RecordingNetwork(TorchNetwork(checkpoint.model, checkpoint.spec))
    seeds, conditions = range(CALIBRATION_SEED, CALIBRATION_SEED + config.samples), context.conditions(config.samples)
    generate(recording, checkpoint.spec, seeds, batch=config.batch, conditions=conditions)
    quantize_with_nncf(files[FLOAT], recording.feeds, name in TRANSFORMERS, files[PEER])
    return files, quantized.spec


def quantize_with_nncf(graph: Path, batches: Sequence[dict[str, np.ndarray]], transformer: bool, out: Path) -> None:
    """Quantize `graph` with NNCF's post-training quantization and save it as an OpenVINO IR.

    The preset is NNCF's default for the model type. On the teacher, `mixed`, advised for activations other than ReLU,
    was 3 dB worse. Splitting the batches into single samples cost another 3 dB, since NNCF averages its ranges over
    the entries of the dataset.
    """
    from peers.nncf_ptq import quantize_onnx

    with contextlib.redirect_stdout(sys.stderr):
        quantize_onnx(graph, batches, transformer, has_dot_products(), out)


def has_dot_products() -> bool:
    """Return whether this processor multiplies 8-bit integers without a 16-bit intermediate sum, which can overflow."""
    from diffpress.runtime.benchmarking.bench import machine

    return not DOT_PRODUCTS.isdisjoint(machine()["instruction_sets"])


def compare(name: str, threads: int, repeats: int, batch: int, work: Path) -> dict[str, Any]:
    """Write the three files in `work` and measure them in both engines; return one model's entry of the JSON report."""
    from diffpress.compress.models.adapter import adapter_for
    from diffpress.runtime.engines import load_engine
    from diffpress.runtime.network_inputs import dummy_inputs

    checkpoint = load_model(name, work / "model")
    files, corrected = make_files(name, checkpoint, work)
    with contextlib.ExitStack() as stack:
        engines: Engines = {}
        for engine, precisions in ENGINES.items():
            for precision in precisions:
                opened = load_engine(files[precision], engine, threads)
                engines[engine, precision] = stack.enter_context(contextlib.closing(opened))
        step_ms = medians(engines, checkpoint.spec, batch, repeats)
        specs = {FLOAT: checkpoint.spec, OURS: corrected, PEER: checkpoint.spec}
        psnr = paired_psnr(engines, specs, PSNR_SAMPLES[name], batch)
        inputs = dummy_inputs(engines[REFERENCE], checkpoint.spec, batch)
        reports = {key: opened.precision_report(inputs) for key, opened in engines.items()}
    sensitive = adapter_for(checkpoint.model).sensitive_layers(checkpoint.model)
    rows = [
        {
            "engine": key[0],
            "precision": key[1],
            "step_ms": step_ms[key],
            "ratio": step_ms[key] / step_ms[key[0], FLOAT],
            "psnr_db": psnr.get(key),
            "integer_mac_share": reports[key].integer_mac_share,
            "integer_outside_kept": integer_share_outside(reports[key], sensitive),
            "file_ratio": size(files[key[1]]) / size(files[FLOAT]),
        }
        for key in engines
    ]
    parameters = sum(parameter.numel() for parameter in checkpoint.model.parameters())
    return {"model": name, "parameters": parameters, "batch": batch, "rows": rows, "verdicts": verdicts(rows)}


def medians(engines: Engines, spec: DenoiserSpec, batch: int, repeats: int) -> dict[Key, float]:
    """Return the median milliseconds of the plan's first step per engine, in alternation after a warm-up round."""
    from diffpress.runtime.benchmarking.bench import sample_once
    from diffpress.runtime.benchmarking.timer import alternating_times_ms

    first = spec.with_plan(replace(spec.plan, timesteps=spec.plan.timesteps[:1]))
    works = [partial(sample_once, engine, first, batch) for engine in engines.values()]
    for work in works:
        work()
    times = alternating_times_ms(works, repeats)
    return {key: statistics.median(measured) for key, measured in zip(engines, times, strict=True)}


def paired_psnr(engines: Engines, specs: dict[str, DenoiserSpec], samples: int, batch: int) -> dict[Key, float]:
    """Return the PSNR of each engine's final samples against REFERENCE's, from the same noise and labels."""
    from diffpress.compress.evaluation.metrics import psnr_db
    from diffpress.runtime.sampler import generate

    seeds, (low, high) = range(SEED, SEED + samples), specs[FLOAT].data_range
    made = {key: generate(engine, specs[key[1]], seeds, batch=batch) for key, engine in engines.items()}
    return {key: psnr_db(made[REFERENCE], ours, high - low) for key, ours in made.items() if key != REFERENCE}


def integer_share_outside(precision_report: PrecisionReport, sensitive: Sequence[str]) -> float:
    """Return the integer MAC share without the `sensitive` layers, which diffpress keeps in float by default."""
    return precision_report.integer_mac_share / (
        1.0 - sum(precision_report.float_layers.get(layer, 0.0) for layer in sensitive)
    )


def size(path: Path) -> int:
    """Return the bytes of a model with its weights, which ONNX stores in FILE.data and OpenVINO in FILE.bin."""
    files = (path, path.with_name(f"{path.name}.data"), path.with_suffix(".bin"))
    return sum(file.stat().st_size for file in files if file.is_file())


def verdicts(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Compare the results with their bounds; return rows of {"what", "value", "bound", "passed"}."""
    table = {(row["engine"], row["precision"]): row for row in rows}
    ours, theirs, other = table["openvino", OURS], table["openvino", PEER], table["onnxruntime", OURS]
    checks = [
        ("OpenVINO int8 / fp32", ours["ratio"], "<=", OPENVINO_RATIO),
        ("ONNX Runtime int8 / fp32", other["ratio"], "<=", ONNXRUNTIME_RATIO),
        ("integer MAC share outside the sensitive layers, OpenVINO", ours["integer_outside_kept"], ">=", INTEGER_SHARE),
        (
            "integer MAC share outside the sensitive layers, ONNX Runtime",
            other["integer_outside_kept"],
            ">=",
            INTEGER_SHARE,
        ),
        ("file / fp32 file", ours["file_ratio"], "<=", FILE_RATIO),
        ("step / NNCF's step, OpenVINO", ours["step_ms"] / theirs["step_ms"], "<=", 1.0),
        ("PSNR against NNCF's PSNR, OpenVINO, dB", ours["psnr_db"], ">=", theirs["psnr_db"]),
    ]
    return [check(*entry) for entry in checks]


def show(result: Mapping[str, Any]) -> None:
    """Print one model's results as a Markdown table, followed by one line per verdict."""
    print(f"\n**{result['model']}**, {result['parameters'] / 1e6:.1f}M parameters, batch {result['batch']}\n")
    print("| engine | model | step ms | / fp32 | PSNR dB | int MACs | file |\n|---|---|---|---|---|---|---|")
    for row in result["rows"]:
        psnr = "-" if row["psnr_db"] is None else f"{row['psnr_db']:.2f}"
        print(
            f"| {row['engine']} | {row['precision']} | {row['step_ms']:.1f} | {row['ratio']:.2f} | {psnr} "
            f"| {row['integer_mac_share']:.3f} | {row['file_ratio']:.3f} |"
        )
    print()
    print("\n".join(check_line(row) for row in result["verdicts"]))
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"{', '.join(MODELS)} (default: all)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--work", type=Path, help="folder to keep the models in (default: a temporary one)")
    args = parser.parse_args()
    unknown = [name for name in args.models if name not in MODELS]
    if unknown:
        parser.error(f"unknown model '{unknown[0]}': choose from {', '.join(MODELS)}")
    if min(args.threads, args.repeats, args.batch) < 1:
        parser.error("--threads, --repeats and --batch must be at least 1")
    if importlib.util.find_spec("nncf") is None:
        parser.error("NNCF is not installed: pip install nncf")
    import torch

    from diffpress.runtime.benchmarking.bench import machine

    torch.set_num_threads(args.threads)
    report: dict[str, Any] = {"machine": machine(), "threads": args.threads, "repeats": args.repeats, "models": []}
    for name in args.models or MODELS:
        with tempfile.TemporaryDirectory() as temporary:
            work = (args.work or Path(temporary)) / name
            work.mkdir(parents=True, exist_ok=True)
            result = compare(name, args.threads, args.repeats, args.batch, work)
        show(result)
        report["models"].append(result)
    print("\n" + json.dumps({key: report[key] for key in ("machine", "threads", "repeats")}))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
