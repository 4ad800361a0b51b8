"""Estimates what a run takes before it starts: memory per rank, bytes received, hours and dollars.

devices.py text_estimate.py architectures.py   cluster, text and models: read, counted or assumed
shapes.py                                      parameters, FLOPs and activations of the real modules, as fake tensors
zero_partition.py step_cost.py                 one step on one rank under each ZeRO stage; tests compare it with DeepSpeed
planner.py plan_text.py                        the plan of a run, with advice; the plan as text
calibration.py                                 measures the assumed rates in a minute of training on this machine
"""
