"""Task finetune: a causal language model on examples. The loss is of the answers' tokens alone, averaged over all that
a step learns."""
