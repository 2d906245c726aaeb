"""PEFT and PyTorch alone, in a process of their own: ``python -m jaxserve.bench.gpu_peft CONFIG BATCH LENGTHS``.

Prints a line of JSON for each sequence length: that, and seconds of an optimizer step with a batch of such sequences.
"""

import json
import sys
import time


def main(config: str, batch: int, lengths: list[int]) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    cuda = torch.cuda.is_available()
    with torch.device("cuda" if cuda else "cpu"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config), dtype=torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for length in lengths:
        ids = torch.randint(model.config.vocab_size, (batch, length), device=model.device)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        print(json.dumps({"tokens": length, "seconds": min(times)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), [int(length) for length in sys.argv[3:]])
