"""lax.ragged_all_to_all for CPUs, by its documentation: everything to everyone, then each takes its own."""

import jax.numpy as jnp
from jax import lax


def ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """Rows that the device of index j sends to i stand in i's output at what j gives as output_offsets[i]."""
    del recv_sizes
    me = lax.axis_index(axis_name)
    everything = lax.all_gather((operand, input_offsets, send_sizes, output_offsets), axis_name)
    place = jnp.arange(output.shape[0])
    for sender in range(lax.axis_size(axis_name)):
        rows, start, size, to = (part[sender] for part in everything)
        inside = (place >= to[me]) & (place < to[me] + size[me])
        taken = rows.at[jnp.where(inside, start[me] + place - to[me], rows.shape[0])].get(mode="fill", fill_value=0)
        output = jnp.where(inside.reshape(-1, *[1] * (output.ndim - 1)), taken, output)
    return output
