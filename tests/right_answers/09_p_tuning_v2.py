"""Other right answers to exercise 09: (check, source of the answer)."""

RIGHT = [
    (
        "deep_prompt",
        """
def deep_prompt(model, prompts, input_ids):  # wrappers around the blocks, taken out afterward
    class Deep(torch.nn.Module):
        def __init__(self, block, own):
            super().__init__()
            self.block, self.own = block, own

        def forward(self, h, *args, **rest):
            own = self.own.repeat(h.shape[0], 1, 1)
            return self.block(torch.cat((own, h[:, self.own.shape[0] :]), dim=1), *args, **rest)

    old = list(model.model.layers)
    for i in range(len(old)):
        model.model.layers[i] = Deep(old[i], prompts[i])
    text = model.get_input_embeddings()(input_ids)
    room = text.new_zeros(text.shape[0], prompts.shape[1], text.shape[2])
    logits = model(inputs_embeds=torch.cat((room, text), dim=1)).logits
    for i in range(len(old)):
        model.model.layers[i] = old[i]
    return logits[:, -input_ids.shape[1] :]
""",
    ),
    (
        "deep_prompt",
        """
from functools import partial

def deep_prompt(model, prompts, input_ids):  # written into the states in place
    n = prompts.size(1)

    def write(block, args, own):
        args[0][:, :n] = own

    handles = []
    for block, own in zip(model.model.layers, prompts):
        handles.append(block.register_forward_pre_hook(partial(write, own=own)))
    text = model.get_input_embeddings()(input_ids)
    front = torch.zeros(len(text), n, text.size(2), dtype=text.dtype, device=text.device)
    mask = torch.ones(len(text), n + text.size(1), dtype=torch.long, device=text.device)
    output = model(inputs_embeds=torch.cat([front, text], 1), attention_mask=mask)
    [handle.remove() for handle in handles]
    return output.logits[:, n:, :]
""",
    ),
    (
        "deep_prompt",
        """
def deep_prompt(model, prompts, input_ids):  # block 0 needs no hook
    n, batch = prompts.shape[1], input_ids.shape[0]
    handles = []
    for i in range(1, len(prompts)):
        def hook(block, args, i=i):
            front = prompts[i].unsqueeze(0).repeat(batch, 1, 1)
            return torch.cat([front, args[0][:, n:, :]], dim=1)
        handles.append(model.model.layers[i].register_forward_pre_hook(hook))
    text = model.model.embed_tokens(input_ids)
    embeds = torch.cat([torch.stack([prompts[0]] * batch), text], dim=1)
    logits = model(inputs_embeds=embeds, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits[:, n:]
""",
    ),
    (
        "keys_and_values",
        """
def keys_and_values(model, i, h):  # head by head
    block = model.model.layers[i]
    attention, x = block.self_attn, block.input_layernorm(h[None])[0]
    d, positions = attention.head_dim, torch.arange(h.shape[0])
    keys = [rope(model, part[None], positions)[0] for part in attention.k_proj(x).split(d, dim=1)]
    values = attention.v_proj(x).split(d, dim=1)
    return [torch.stack(keys), torch.stack(values)]
""",
    ),
    (
        "keys_and_values",
        """
def keys_and_values(model, i, h):  # the block itself fills a cache
    from transformers import DynamicCache
    cache, states = DynamicCache(), h.unsqueeze(0)
    positions = torch.arange(len(h)).unsqueeze(0)
    block = model.model.layers[i]
    block(states, position_embeddings=model.model.rotary_emb(states, positions),
          past_key_values=cache)
    return cache.layers[i].keys[0], cache.layers[i].values[0]
""",
    ),
    (
        "count",
        """
def count(form, layers, hidden, kv_heads, head_dim, n):
    total = 0
    for _ in range(layers):
        for _ in range(n):
            if form == "key_value":
                total += kv_heads * head_dim  # the key
                total += kv_heads * head_dim  # the value
            else:
                total += hidden
    return total
""",
    ),
    (
        "last_states",
        """
def last_states(states, attention_mask, n):
    chosen = []
    for state, mask in zip(states, attention_mask):
        chosen.append(state[n + mask.nonzero().max()])
    return torch.stack(chosen)
""",
    ),
    (
        "last_states",
        """
def last_states(states, attention_mask, n):
    seq = attention_mask.size(1)
    back = attention_mask.flip(1).argmax(1)  # how far from the end
    index = (n + seq - 1 - back).view(-1, 1, 1).expand(-1, 1, states.size(-1))
    return states.gather(1, index).squeeze(1)
""",
    ),
    (
        "free_dimensions",
        """
def free_dimensions(tie, h):
    of_key, of_value = torch.autograd.functional.jacobian(lambda x: tuple(tie(x)), h)
    return torch.linalg.matrix_rank(torch.vstack([of_key, of_value])).item()
""",
    ),
    (
        "free_dimensions",
        """
def free_dimensions(tie, h):  # one backward pass for each output
    h = h.detach().clone().requires_grad_()
    outputs = torch.cat(tuple(tie(h)))
    rows = [torch.autograd.grad(out, h, retain_graph=True)[0] for out in outputs]
    values = torch.linalg.svdvals(torch.stack(rows))
    return int((values > values.max() * 1e-10).sum())
""",
    ),
]
