"""Checkpoints that belong to the model and not to the engine that wrote them.

    step-00000200/
      rank-00.safetensors …  whole tensors, shared out over the ranks that wrote: `NAME` (fp32 master, frozen value, or
                             buffer), `NAME|exp_avg` and what other moments a trained parameter has
      state.json             step, held-out loss, each group's count of updates, the method's own state, the guard's,
                             sizes and SHA-256 of the files above
      COMPLETE               written last; a directory without it does not count
      rollbacks.json         only where the run has gone back to it

Nothing in it depends on the number of ranks, the ZeRO stage or offloading, and nothing is a pickle. DeepSpeed's own
checkpoints are both; see docs/decisions/0003-own-checkpoints.md.

layout.py     names and checksums that writing and reading share
place.py      where they lie: a directory, or what fsspec reaches
writing.py    a copy to host memory, the write in the background, the commit at a step's end, what is kept
reading.py    the newest whole one, its values into a model and its moments into an engine
retention.py  which ones are kept
rollback.py   which one is gone back to, and the record of it
"""
