"""PEFT adapters: files in and out, the host store, the bank on the device."""
