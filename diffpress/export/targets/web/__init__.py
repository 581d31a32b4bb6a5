"""Target web: a static folder that samples in a browser.

onnxruntime_web   the files of ONNX Runtime Web, from its npm package
tokenizer_check   which tokenizers the page has
target            the folder: page, sampler.onnx, tokenizers, ONNX Runtime Web
page/             the page and its modules, copied as they are
"""
