"""What `harness.profile` is made of, one file a concern.

points   what one point is, and the journal of finished ones
lengths  starts a process for each point, survives its death, goes on where it was stopped
worker   that process: its memory limit, what it prints
subject  the point's model and its inputs
measure  time, memory and energy of the point
fits     growth exponents, slopes and crossovers, with intervals
summary  a finished sweep as one JSON object
tables   a finished sweep as tables
"""
