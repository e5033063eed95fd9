"""How much text a command reads unless it is told otherwise; in a file of their own, which --help can have at once."""

EVALUATED_TOKENS = 262_144
COMPARED_TOKENS = 32_768  # held out
CALIBRATION_TOKENS = 16_384
