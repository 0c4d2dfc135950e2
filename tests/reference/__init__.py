"""Every method once more, on full matrices and by hand, as the papers write it: what the trainer is compared with.

Shared with the trainer are the settings and the schedule of η, no more: no factorised module, no autograd in a rule.
"""
