"""From answers to numbers: imports, judge, intervals, paired tests, submissions."""
