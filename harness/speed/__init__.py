"""The measurements behind `harness.bench`, one file a question.

timing          run contenders in alternation; what a measurement is
machine         the machine's own limits: memory bandwidth and matrix multiplication rate
scan            the selective scan against transformers' loop and mamba-ssm's reference
language_model  prefill and decode of a 130M-shaped model
training        a training step: tokens per second and peak memory
evaluation      questions per second on POPE- and MME-shaped work
invariance      whether answers depend on the batch
"""
