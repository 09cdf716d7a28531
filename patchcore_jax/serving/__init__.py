"""The HTTP service: `app` answers requests, `batcher` lets them share a batch, `server` listens.

Needs the extra [serve]: starlette, uvicorn, python-multipart, prometheus_client.
"""
