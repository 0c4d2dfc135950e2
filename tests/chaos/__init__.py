"""A service under seeded faults, judged from the outside.

    plan.py      what will happen when, as data: a pure function of the seed
    specs.py     what is trained, and the curve of each when nobody disturbs it
    world.py     the stack under test: what is killed is started again after a while, as an operator's supervisor would
    faults.py    each fault: what it does to the world, and what it undoes later
    campaign.py  carries a plan out, and waits for the end
    check.py     what was promised, against what was seen
    report.py    for people, and for machines

`tests/system/watch.py` looks all the while how many trainers are alive. Start it with python -m tests.chaos --help.
"""
