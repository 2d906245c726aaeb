"""The paged KV cache: pages on the host, the pool on the device."""
