"""Which tests stay together when they run in several processes.

Those of a file, since what a file sets up for all of them is set up once. And of all files those that start groups of
ranks, since such groups use every core and hinder one another; only when the whole matrix is trained are there so many
that the numbers of ranks are kept apart instead.
"""

import re
from typing import Any

from xdist.scheduler import LoadScopeScheduling

GROUPS_OF_RANKS = "tests/distributed/"


class Together(LoadScopeScheduling):
    def __init__(self, config: Any, log: Any) -> None:
        super().__init__(config, log)
        self._whole_matrix = config.option.markexpr != "not matrix"

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        if not file.startswith(GROUPS_OF_RANKS):
            return file
        ranks = re.search(r"test_it_is_the_papers\[.*-([123])x[12]", nodeid)
        return f"{file}, {ranks[1]} ranks" if ranks and self._whole_matrix else GROUPS_OF_RANKS
