"""The Python interface: load, compress, export, bench and evaluate. `diffpress.Pipeline` samples.

Heavy packages are imported inside the functions, so that each needs only what it uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from diffpress.compress.builtin import TEACHER
from diffpress.runtime.errors import InvalidInputError, unknown_name

if TYPE_CHECKING:
    from diffpress.compress.checkpoint import Checkpoint
    from diffpress.compress.config import StageConfig
    from diffpress.compress.recipe import Recipe
    from diffpress.runtime.bundle import Bundle
    from diffpress.runtime.engines.options import EngineOptions
    from diffpress.runtime.engines.tensorrt.options import BuildOptions

PIXEL_SAMPLES, LATENT_SAMPLES = 2000, 64  # of `evaluate`, per seed


def load(reference: str | Path = TEACHER, *, loras: Sequence[str] = (), config: str | Path | None = None) -> Checkpoint:
    """Load a pretrained model.

    Args:
        reference: A diffusers pipeline folder, a checkpoint that a run saved, a hub id "owner/name", a single
            .safetensors file, or a custom module as "my_model.py:weights.safetensors". The default is the built-in
            teacher.
        loras: LoRAs to fuse first, each "PATH" or "PATH:SCALE".
        config: Pipeline folder or hub id that describes how a single .safetensors file is built.

    Returns:
        A frozen checkpoint: `model` (torch module), `spec` and `history`.

    Raises:
        InvalidInputError: If it cannot be found, read or understood. Weights are never unpickled.

    Examples:
        >>> import diffpress as dp
        >>> model = dp.load(checkpoint)
        >>> model.spec.sample_shape
        (1, 8, 8)
    """
    from diffpress.compress.sources.load import load_checkpoint

    return load_checkpoint(reference, loras=loras, config=None if config is None else str(config))


def compress(
    model: Checkpoint | str | Path,
    stages: StageConfig | Sequence[StageConfig] | Recipe | str | Path,
    *,
    out: str | Path,
    data: str | Path | None = None,
    teacher: str | Path | None = None,
    seed: int | None = None,
    update: bool = False,
) -> Checkpoint:
    """Run stages on a model and return the smaller checkpoint; finished stages are kept and reused.

    Args:
        model: A checkpoint from `load`, or what `load` takes.
        stages: A stage object (`Prune`, `Recover`, `Quantize`, ...) or several in order; or a `Recipe`, a recipe's
            file, or the name of a built-in recipe, of which only the stages are run.
        out: Folder for the finished stages. The same call again resumes there.
        data: Training samples (.npz or .npy), with captions for models of text, or prompts (.txt) for them. A recipe
            names its own.
        teacher: The model to distill from, if not the model itself. A recipe names its own.
        seed: Every random draw follows from it (0). A recipe names its own.
        update: Accept an `out` that was made with other settings, and redo only what changed.

    Raises:
        InvalidInputError: For settings that do not fit the model, an impossible order, or a folder of another run.

    Examples:
        >>> import diffpress as dp
        >>> small = dp.compress(checkpoint, [dp.Prune(method="magnitude", ratio=0.5, round_to=4)], out=folder / "work")
        >>> [record.stage for record in small.history]
        ['prune']
    """
    from diffpress.compress.checkpoint import Checkpoint
    from diffpress.compress.config import StageConfig
    from diffpress.compress.pipeline import check_start, claim_folder, load_teacher, run_stages
    from diffpress.compress.recipe import Recipe
    from diffpress.compress.training import distributed
    from diffpress.compress.workspace import reserved
    from diffpress.export.targets.engine_cost import open_engine_costs

    if isinstance(stages, str | Path):
        stages = Recipe.load(stages)
    if isinstance(stages, StageConfig):
        stages = [stages]
    if isinstance(stages, Recipe):
        if data is not None or teacher is not None or seed is not None:
            raise InvalidInputError(
                "compress: the recipe names data, teacher and seed itself; leave them out of the call"
            )
        recipe = stages
    else:
        recipe = Recipe.of(stages, data=data, teacher=teacher, seed=seed or 0)
    checkpoint = model if isinstance(model, Checkpoint) else load(model)
    loaded_teacher = load_teacher(checkpoint, recipe)
    check_start(checkpoint, recipe, "compress")
    with reserved(Path(out)) if distributed.is_main() else nullcontext():
        claim_folder(Path(out), checkpoint, recipe, update, loaded_teacher)
        return run_stages(checkpoint, recipe, Path(out), open_engine_costs, loaded_teacher)


def export(
    checkpoint: Checkpoint | str | Path,
    out: str | Path,
    *,
    targets: Sequence[str] = ("onnx",),
    precision: str = "fp32",
    size: tuple[int, int] | None = None,
    fixed_timesteps: bool = False,
    image_inputs: bool = False,
    decoder: str | Path | None = None,
    nearest_plan: bool = False,
    controlnet: Sequence[str | Path] = (),
    lora_slots: int = 0,
    lora_rank: int = 32,
    lora_layers: str = "linear",
    revert_slower: bool = False,
    compute_capabilities: Sequence[str] = (),
    build: BuildOptions | None = None,
    web_runtime: str | Path | None = None,
    threads: int | None = None,
    parity_sqnr_db: float | None = None,
) -> Bundle:
    """Export a checkpoint as a bundle: the folder that is deployed and sampled from without torch.

    Args:
        checkpoint: From `load` or `compress`, or what `load` takes.
        out: The bundle's folder. One that holds anything but a bundle is refused.
        targets: Of "onnx", "openvino" and "tensorrt": the engines to build or check the bundle for; "sampler" for a
            whole sampling run in one ONNX file, "triton" for that as a model repository of Triton, "web" for a page
            that samples in a browser, and "genai" for the folder that OpenVINO GenAI opens.
        precision: "fp32", "fp16" or "bf16", of the float graphs; norms, softmax and decoders stay fp32.
        size: Height and width of the image in pixels, to fix them in the graphs.
        fixed_timesteps: Fold the timestep embedding for the plan's own timesteps into constants.
        image_inputs: Export the encoder of the autoencoder, so that the bundle can start from images.
        decoder: Folder of an autoencoder of diffusers that is exported in place of the pipeline's, such as a tiny one
            (TAESD, `AutoencoderTiny`); with `image_inputs` its encoder is exported as well.
        nearest_plan: For target "genai": export the nearest plan that OpenVINO GenAI can follow, if it cannot follow
            the model's own.
        controlnet: ControlNets to export with the U-Net, folders or hub ids, in the order of their images.
        lora_slots: LoRAs that can be set in the bundle at the same time (`Pipeline.set_loras`).
        lora_rank: Largest rank of a LoRA that a slot takes.
        lora_layers: Layers with slots: "linear" layers and convolutions of 1 x 1, or "all", larger ones as well.
        revert_slower: Give the float graph to engines that the quantized graph slows down on this machine.
        compute_capabilities: GPUs to build TensorRT engines for, as "8.9"; none means that of this machine.
        build: How TensorRT engines are built.
        web_runtime: Folder of the npm package onnxruntime-web, for target "web"; None takes that in node_modules.
        threads: Processor threads of the parity check; None for all.
        parity_sqnr_db: SQNR to torch in dB that the denoiser's graphs must reach; None for the built-in bounds.

    Raises:
        InvalidInputError: For options that do not fit the checkpoint.
        GateFailedError: If parity with torch fails. The bundle is kept, and its manifest lists what failed.

    Examples:
        >>> import diffpress as dp
        >>> exported = dp.export(checkpoint, folder / "bundle", threads=1)
        >>> exported.path.name
        'bundle'
    """
    from pydantic import ValidationError

    from diffpress.compress.checkpoint import Checkpoint
    from diffpress.compress.config import ExportConfig, ExportPrecision, Target, input_error
    from diffpress.compress.sources.autoencoder import with_decoder
    from diffpress.export.bundle import check_output_folder, export_bundle
    from diffpress.runtime.engines.tensorrt.options import BuildOptions

    check_output_folder(Path(out))  # before the checkpoint is read, which may take minutes
    named = [*(("export target", target, Target) for target in targets), ("precision", precision, ExportPrecision)]
    for what, name, known in named:
        if name not in get_args(known):
            raise unknown_name(what, name, get_args(known))
    settings = {
        "targets": targets,
        "precision": precision,
        "size": size,
        "fixed_timesteps": fixed_timesteps,
        "image_inputs": image_inputs,
        "nearest_plan": nearest_plan,
        "controlnet": [str(one) for one in controlnet],
        "lora_slots": lora_slots,
        "lora_rank": lora_rank,
        "lora_layers": lora_layers,
        "revert_slower": revert_slower,
        "web_runtime": None if web_runtime is None else str(web_runtime),
        "threads": threads,
        "tensorrt": {"compute_capabilities": compute_capabilities, **(build or BuildOptions()).to_json()},
    }
    try:
        config = ExportConfig.model_validate(settings)
    except ValidationError as error:
        raise input_error(error, ExportConfig, "export") from error
    checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else load(checkpoint)
    if decoder is not None:
        checkpoint = with_decoder(checkpoint, Path(decoder))
    return export_bundle(checkpoint, Path(out), config, parity_sqnr_db=parity_sqnr_db)


def bench(
    bundle: str | Path,
    baselines: str | Path | Sequence[str | Path] = (),
    *,
    batch: Sequence[int] = (1, 8),
    engines: Sequence[str | None] = (None,),
    repeats: int = 3,
    options: EngineOptions | None = None,
    public_key: str | Path | None = None,
) -> dict[str, Any]:
    """Measure a bundle against its baselines in one run; returns what `diffpress bench --json` writes.

    Args:
        bundle: The bundle's folder.
        baselines: One or several: checkpoints, which run in PyTorch eager, and bundles, which run in each engine.
        batch: The batch sizes to measure.
        engines: Names of engines; None for the preferred one, `["all"]` for all that are installed.
        repeats: Alternating rounds, of which medians are taken.
        options: Threads, precision and so on, for every engine.
        public_key: PEM file of the Ed25519 key that every bundle has to be signed with.

    Examples:
        >>> import diffpress as dp
        >>> result = dp.bench(bundle, batch=[1], repeats=1)
        >>> [row["batch"] for row in result["rows"]]
        [1]
    """
    from diffpress.compress.evaluation.bench import bench as measure_bundle

    baselines = [baselines] if isinstance(baselines, str | Path) else baselines
    return measure_bundle(
        bundle, baselines, batch=batch, engines=engines, repeats=repeats, options=options, public_key=public_key
    )


def evaluate(
    subject: str | Path,
    *,
    against: str | Path | None = None,
    samples: int | None = None,
    seeds: int = 3,
    batch: int = 64,
    steps: int | None = None,
    features: str | Path | None = None,
    reference: str | Path | None = None,
    prompts: str | Path | None = None,
    candidates: str | Path | None = None,
    engine: str | None = None,
    threads: int | None = None,
    options: EngineOptions | None = None,
    public_key: str | Path | None = None,
) -> dict[str, Any]:
    """Score samples of a bundle or checkpoint; returns what `diffpress evaluate --json` writes.

    Args:
        subject: A bundle, which runs in an engine, or a checkpoint, which runs in torch.
        against: Another bundle or checkpoint, for PSNR and SSIM from the same noise.
        samples: Images for each seed, at least 8; None for 2000 in pixel space and 64 for models of latents.
        seeds: Independent draws, of which mean and standard deviation are given.
        batch: Images sampled together.
        steps: Denoising steps other than the sampling plan's.
        features: Image encoder (ONNX; see `diffpress.compress.evaluation.features`), with a text encoder also for a
            CLIP score. None for the built-in one, which fits 28 x 28 grey images; a model of latents is then only
            compared with `against`.
        reference: Real images as .npz or a folder, or their features as .npz. None for the built-in images with the
            built-in features, else for samples of `against`.
        prompts: Prompts of a text model, one per line, used in turn; None for the built-in ones.
        candidates: Texts for the retrieval accuracy, one per line: an image is correct if its nearest text is the
            longest one that its prompt contains. None for the distinct prompts.
        engine: Engine of a bundle; None for the first one that can run here.
        threads: Processor threads; overrides those of `options`. None for all.
        options: Precision and so on, of the engine of a bundle.
        public_key: PEM file of the Ed25519 key that the bundles have to be signed with.

    Raises:
        InvalidInputError: If the feature network does not fit the model's images, too few samples are asked for, or an
            engine is named for checkpoints alone.

    Examples:
        >>> import diffpress as dp
        >>> scores = dp.evaluate("calib_data/teacher", samples=8, seeds=1, steps=1)
        >>> sorted(scores["kid"])
        ['mean', 'sd']
    """
    for name, value, least in (("samples", samples, 8), ("seeds", seeds, 1), ("batch", batch, 1)):
        if value is not None and value < least:
            raise InvalidInputError(f"{name} = {value}: too few, give at least {least}")
    from diffpress.compress.config import EvaluateConfig
    from diffpress.compress.evaluation.evaluate import evaluate as score_samples
    from diffpress.compress.evaluation.evaluate import open_features, open_reference, paired, unscored
    from diffpress.compress.evaluation.open_subject import check_engine_options, open_subject, torch_threads
    from diffpress.compress.training.teacher_data import read_prompts
    from diffpress.runtime.engines.options import EngineOptions
    from diffpress.runtime.requested_plan import requested_spec

    options = (options or EngineOptions()).with_threads(threads)
    subjects = [str(one) for one in (subject, against) if one is not None]
    check_engine_options(subjects, engine, options)
    texts = read_prompts(None if prompts is None else Path(prompts))
    opening: dict[str, Any] = {"engine": engine, "options": options, "texts": texts, "public_key": public_key}
    with ExitStack() as stack:
        stack.enter_context(torch_threads(options.threads))
        ours = stack.enter_context(closing(open_subject(str(subject), **opening)))
        if prompts is not None and ours.encode is None:
            raise InvalidInputError(f"{prompts}: {subject} encodes no prompts; leave them out")
        ours = ours.with_spec(requested_spec(ours.spec, steps))
        count = samples or (PIXEL_SAMPLES if ours.spec.is_pixel_space else LATENT_SAMPLES)
        config = EvaluateConfig(
            samples=count,
            seeds=seeds,
            batch=batch,
            features=None if features is None else Path(features),
            reference=None if reference is None else Path(reference),
            candidates=None if candidates is None else Path(candidates),
        )
        feature_network = open_features(config, ours.spec, options.threads)
        other = None
        if against is not None:
            other = stack.enter_context(closing(open_subject(str(against), **opening)))
        elif feature_network is None:
            raise InvalidInputError(
                f"{subject}: no built-in features fit its images; name an ONNX image encoder with --features, or a "
                "model to compare it with from the same noise with --against"
            )
        result = unscored(config.samples, config.seeds)
        if feature_network is not None:
            named = "" if against is None else Path(against).name
            real = open_reference(config, feature_network, ours.spec, other, named)
            result = score_samples(ours, config, feature_network, real)
        if other is not None:
            result["paired"] = paired(ours, other, config, Path(str(against)).name)
    return result
