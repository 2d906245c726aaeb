"""The decoder: pure maths with two open slots, families as data, weights streamed in."""
