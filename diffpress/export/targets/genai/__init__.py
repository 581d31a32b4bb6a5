"""Target `genai`: a folder that `openvino_genai.Text2ImagePipeline(folder, device)` opens."""
