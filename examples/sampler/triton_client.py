"""Draw images with a bundle's sampler in Triton Inference Server; the prompt is tokenized here.

    tritonserver --model-repository=BUNDLE/triton
    python triton_client.py BUNDLE --prompt "a red cat" --url localhost:8001 --out image.png

It needs tritonclient[grpc], numpy and pillow, and tokenizers for prompts. The options are those of python_sampler.py,
which makes the same inputs. The folder of the bundle is read for sampler.json and the tokenizers alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from python_sampler import arguments, conditioning, starting_noise, write_images
from tritonclient import grpc

MODEL = "sampler"
TYPES = {"float32": "FP32", "int64": "INT64"}


def infer_inputs(feed: Mapping[str, np.ndarray]) -> list[Any]:
    """Return the request's tensors; a number without dimensions is sent as [1], as config.pbtxt asks for."""
    inputs = []
    for name, array in feed.items():
        shaped = array.reshape(array.shape or (1,))
        inputs.append(grpc.InferInput(name, list(shaped.shape), TYPES[array.dtype.name]))
        inputs[-1].set_data_from_numpy(np.ascontiguousarray(shaped))
    return inputs


def main() -> None:
    parser = arguments("Draw images with the sampler in Triton.")
    parser.add_argument("--url", default="localhost:8001")
    args = parser.parse_args()
    inputs = json.loads((args.bundle / "sampler.json").read_text(encoding="utf-8"))["inputs"]
    feed = {"noise": starting_noise(inputs, args), **conditioning(args.bundle, inputs, args)}
    with grpc.InferenceServerClient(args.url) as client:
        found = client.infer(MODEL, infer_inputs(feed), outputs=[grpc.InferRequestedOutput("images")])
    write_images(found.as_numpy("images"), args)


if __name__ == "__main__":
    main()
