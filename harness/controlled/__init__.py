"""What `harness.study` is made of: language models and connectors compared under equal terms.

design       families, connectors, orders, scales, as data
plan         the study's jobs in their order: data, text, rates, cells; how long they will take
data         the training data, with its variants and held-out samples
cost         prefill, decode and state of a trained model
records      what a finished job leaves for good: curves, scores of every question, costs
outcomes     what is compared: benchmarks, retrieval by parts, updates until a picture is used
contrasts    differences between cells, with intervals over seeds, pictures and questions
predictions  what was expected, written down before the runs, and what became of it
page         results/STUDY.md, and its pictures
"""
