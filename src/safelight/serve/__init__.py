"""The HTTP server: many requests, one engine.

`worker` owns a model's networks and lets requests join and leave between steps; `jobs` is what a
request is while it waits and runs; `house` is all models, the queue and its limits; `app` is the
HTTP around it, and `dialects` the interfaces that clients already speak, all over one
:class:`~safelight.request.GenerateRequest`.
"""
