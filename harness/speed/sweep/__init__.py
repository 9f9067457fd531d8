"""What `harness.profile` is made of, one file a concern.

points   what one point is, and the journal of finished ones
child    one point, measured in a process of its own
sweep    starts the children, survives their deaths, goes on where it was stopped
fits     growth exponents, slopes and crossovers, with intervals
summary  a finished sweep as one JSON object and as tables
"""
