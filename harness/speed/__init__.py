"""The measurements behind `harness.bench` and `harness.profile`, one file a question.

timing              run contenders in alternation; what a comparison is
certainty           how far repeats differ, what else the machine was doing
machine             the machine's own limits: memory bandwidth and matrix multiplication rate
memory, energy      peak bytes and joules of a piece of work
models              models by name, built as everywhere; prefill and step through their interface
transformers_direct transformers' own forward pass, as baselines are called by harness.bench
scan                the selective scan against transformers' loop and mamba-ssm's reference
language_model      prefill and decode of a 130M-shaped model
training            a training step: tokens per second and peak memory
throughput          questions per second on POPE- and MME-shaped work
invariance          whether answers depend on the batch
bench_report        a run of harness.bench as tables and one JSON object
sweep               harness.profile: cost by sequence length
"""
