"""JaxServe: LLM inference and LoRA finetuning in one jitted step."""
