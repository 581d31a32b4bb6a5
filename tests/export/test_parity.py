import copy

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from compress.torch_network import TorchNetwork
from export.parity import FAKE_QUANT, check_parity, measure_parity
from export.qdq import insert_qdq
from export.to_onnx import save_onnx
from runtime.engines import available
from runtime.errors import GateFailed

SAFE = 127 / 64  # weights within 7 bits


def shifted(graph: onnx.ModelProto, name: str, by: float) -> onnx.ModelProto:
    changed = copy.deepcopy(graph)
    tensor = next(tensor for tensor in changed.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.float32(by), name))
    return changed


def test_a_float_graph_gives_torchs_images_in_every_engine(unet, unet_graph, tmp_path):
    save_onnx(unet_graph, tmp_path / "g.onnx")
    found = check_parity(unet, tmp_path / "g.onnx", threads=1)
    assert set(found) == set(available())
    assert all(row["max_abs"] <= 1e-3 and row["sqnr_db"] > 80 for row in found.values())


def test_parity_measures_the_difference_that_is_there(unet, unet_graph, tmp_path):
    # the last bias reaches every image, through the last step at least
    save_onnx(shifted(unet_graph, "conv_out.bias", 0.01), tmp_path / "g.onnx")
    row = measure_parity(unet, tmp_path / "g.onnx", engines=["onnxruntime"], threads=1)["onnxruntime"]
    assert 1e-3 < row["max_abs"] < 0.5 and 10 < row["sqnr_db"] < 60


def test_a_float_graph_that_strays_fails_with_both_figures(unet, unet_graph, tmp_path):
    save_onnx(shifted(unet_graph, "conv_out.bias", 0.01), tmp_path / "g.onnx")
    with pytest.raises(GateFailed, match=r"g.onnx in onnxruntime: images differ .* by 0\.\d+ .* dB\), 0.001 is"):
        check_parity(unet, tmp_path / "g.onnx", engines=["onnxruntime"], threads=1)


def test_a_quantized_graph_is_held_to_fake_quantization(unet, unet_graph, scales, tmp_path):
    quantized = unet.evolve(quantization=scales(unet, weight_range=SAFE))
    save_onnx(insert_qdq(unet_graph, quantized.quantization), tmp_path / "q.onnx")
    found = check_parity(quantized, tmp_path / "q.onnx", threads=1)
    assert set(found) == {FAKE_QUANT, *available()}
    assert all(10 < row["sqnr_db"] < 80 for row in found.values())

    coarser = {name: amax * (4 if name.endswith(".input") else 1) for name, amax in quantized.quantization.amax.items()}
    wrong = insert_qdq(unet_graph, type(quantized.quantization)("int8", coarser))
    save_onnx(wrong, tmp_path / "q.onnx")
    with pytest.raises(GateFailed, match=r"q.onnx in onnxruntime: .* dB SQNR .* torch's fake quantization has .* dB"):
        check_parity(quantized, tmp_path / "q.onnx", engines=["onnxruntime"], threads=1)


def test_torch_network_leaves_the_mode_of_the_model_alone(everything):
    network = TorchNetwork(everything.model, everything.spec)
    inputs = {"sample": np.zeros((1, 2, 8, 8), np.float32), "timestep": np.zeros(1, np.int64)}
    everything.model.train()
    out = network.run(inputs)
    assert everything.model.training and out.dtype == np.float32 and out.shape == (1, 2, 8, 8)
    assert dict(network.inputs) == {"sample": np.float32, "timestep": np.int64}
    everything.model.eval()
