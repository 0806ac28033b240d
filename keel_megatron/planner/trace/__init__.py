"""`keel plan --trace`: the program itself, run on CUDA tensors that hold no data.

A trace runs one rank of a job in a separate process: the model, Megatron-core's schedule, DDP, the
optimizer and the collection of a checkpoint. Collectives return immediately, and tensors have a
shape, a type and a device but no values. Memory, kernels, messages and host waits are counted in
the running program, not computed by formulas. Values, times, streams and the inside of kernels are
not traced.
"""
