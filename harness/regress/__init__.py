"""Has it become slower? A baseline's runs against a candidate's, row by row, with an exit code that can fail a build.

`thresholds` holds what counts as slower, `sides` reads and matches the two, `verdicts` judges, `report` shows it.
"""
