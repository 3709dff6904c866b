"""Chat templates for backbones that come without one.

Each marks what the assistant writes, its end included, with `{% generation %}`, which transformers turns into a mask.
None knows tools.
"""

from __future__ import annotations

_ROLES = "{% for message in messages %}{% set text = message['content'] | trim %}"
_ASSISTANT = "{% if message['role'] == 'assistant' %}"
_PROMPT = "{% endif %}{% endfor %}{% if add_generation_prompt %}"


def _headed(header: str, end: str, behind: str, start: str = "", text: str = "text") -> str:
    """A family in which a header with the role opens every turn; all arguments are Jinja expressions."""
    said = f"{{% generation %}}{{{{ {text} + {end} }}}}{{% endgeneration %}}{{{{ {behind} }}}}"
    prompt = header.replace("message['role']", "'assistant'")
    return (
        (f"{{{{ {start} }}}}" if start else "")
        + f"{_ROLES}{{{{ {header} }}}}{_ASSISTANT}{said}{{% else %}}{{{{ {text} + {end} + {behind} }}}}"
        + f"{_PROMPT}{{{{ {prompt} }}}}{{% endif %}}"
    )


# the system text stands in the first user turn, where a family has no system turn
_SYSTEM_FIRST = (
    "{% set system = messages[0]['content'] | trim if messages[0]['role'] == 'system' else '' %}"
    "{% set turns = messages[1:] if system else messages %}{{ bos_token }}{% for message in turns %}"
    "{% set text = message['content'] | trim %}"
)

TEMPLATES = {
    "chatml": _headed("'<|im_start|>' + message['role'] + '\\n'", "'<|im_end|>'", "'\\n'"),
    "llama3": _headed(
        "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'", "'<|eot_id|>'", "''", "bos_token"
    ),
    "zephyr": _headed("'<|' + message['role'] + '|>\\n'", "eos_token", "'\\n'"),
    "plain": _headed("message['role'] | capitalize + ':'", "eos_token", "'\\n'", text="' ' + text"),
    "gemma": (
        _SYSTEM_FIRST
        + _ASSISTANT
        + "{{ '<start_of_turn>model\\n' }}{% generation %}{{ text + '<end_of_turn>' }}{% endgeneration %}{{ '\\n' }}"
        + "{% else %}{{ '<start_of_turn>user\\n' }}{{ system + '\\n\\n' if loop.first and system else '' }}"
        + "{{ text + '<end_of_turn>\\n' }}"
        + _PROMPT
        + "{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
    "mistral": (
        _SYSTEM_FIRST
        + _ASSISTANT
        + "{% generation %}{{ ' ' + text + eos_token }}{% endgeneration %}{% else %}"
        + "{{ '[INST] ' }}{{ system + '\\n\\n' if loop.first and system else '' }}{{ text + ' [/INST]' }}"
        + "{% endif %}{% endfor %}"
    ),
}
"""By the names that `task.template` takes. `plain` writes its headers as
words and so suits tokenizers without tokens for them."""
