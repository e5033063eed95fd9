"""How much a command reads and how long it may take unless it is told otherwise; in a file of their own, which --help
can have at once."""

EVALUATED_TOKENS = 262_144
COMPARED_TOKENS = 32_768  # held out
CALIBRATION_TOKENS = 16_384

# Where the measured rate does not allow so many tokens in this time, seconds, there are fewer.
EVALUATION_SECONDS = 300
COMPARISON_SECONDS = 540
QUICK_SECONDS = 60  # with --quick
# Estimates shorter than this are not worth a line.
SILENT_SECONDS = 5
