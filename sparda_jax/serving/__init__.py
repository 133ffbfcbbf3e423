"""A server in the form of OpenAI's API, over one `engine.session` of fixed shapes.

`app` speaks HTTP, `scheduler` runs the session in a thread of its own, `protocol` turns
bodies into jobs, `answers` jobs' outputs into bodies. Needs `sparda-jax[serve]`.
"""
