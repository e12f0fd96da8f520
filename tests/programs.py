"""All test programs. They are our own words for what programs in Pyro's documentation and examples do."""

import programs_chains
import programs_handlers
import programs_mixed
import programs_plates
from program_table import Program

PROGRAMS: list[Program] = [
    *programs_chains.ROWS,
    *programs_plates.ROWS,
    *programs_mixed.ROWS,
    *programs_handlers.ROWS,
]
