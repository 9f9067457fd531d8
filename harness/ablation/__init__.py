"""What `harness.ablate` is made of.

variants   the axes and their variants, as data
cells      one variant with one seed: two training stages and an evaluation, each done once
report     seeds together: means, intervals, the paired difference from the final model
"""
