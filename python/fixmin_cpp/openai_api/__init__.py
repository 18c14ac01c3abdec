"""OpenAI's interface: what a body asks of Model.generate, and the answer made of what that gives.

The server (HTTP) and batch jobs (a line of a file) use it, so that a body means the same in both. What only a server
can give, an answer as a stream, is refused where it is read: GenerationRequest's `streams`. What only a server adds are
its operator's limits and `prompt_tokens_details`, which would make the record of a job depend on what ran before.
"""
