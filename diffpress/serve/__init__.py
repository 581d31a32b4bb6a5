"""diffpress.serve: a server for bundles over HTTP, with the runtime and without torch.

    body --requests/--> ImageRequest --batching--> batches of one plan --sampling--> images --web/--> response

It imports diffpress.runtime and nothing else of ours. Starlette, uvicorn and prometheus-client are in the extra
`serve`.
"""
