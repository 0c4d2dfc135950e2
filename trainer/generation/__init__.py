"""Text from a Hugging Face directory, to try a model out: one process, one model, one answer at a time.

protocol.py    what is asked of the server, and what it answers (no torch)
spoken.py      tokens into text that is fit to be shown: whole characters, nothing of a stop string (no torch)
loaded.py      a directory as a model that generates, and a request as the tokens of a prompt
generate.py    one choice, token by token, by transformers' own `generate`
turns.py       one thread, a short queue, and what becomes of requests whose client has gone (no torch)
server.py      `python -m trainer serve`
greedy.py      what a model says while it is trained, on all ranks alike
"""
