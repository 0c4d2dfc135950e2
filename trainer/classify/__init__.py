"""Task classify: a sequence classifier, or a regression on one number, on labelled sentences or pairs of them.

labels.py   the classes' names: given, GLUE's, or found in the files
files.py    examples and their labels, out of anybody's files or those of GLUE
make.py     the run's files: examples tokenised once
task.py     what a step gives to a rank, and the metrics of what is held out
model.py    the model: a pretrained base and a head, new or its own
"""
