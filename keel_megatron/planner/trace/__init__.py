"""`keel plan --trace`: the program itself, run on CUDA tensors that hold no data.

A trace runs one rank of a job in a process of its own: the model, Megatron-core's schedule, DDP,
the optimizer and a checkpoint's collection, with a process group that answers at once and tensors
that have a shape, a type and a device but no values. What it counts (memory, kernels, messages,
host waits) is what the program does, not what a formula says. It sees no values, no times, no
streams and no kernel's inside.
"""
