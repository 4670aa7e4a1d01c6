"""Chat templates in the form of five model families', and the same with {% generation %} marks set by hand.

Written down here, not compared with the Hub's files.
"""

from __future__ import annotations

_ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    + _ALTERNATE
    + "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + "
    "'<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
_CHATML = (
    "{%% for message in messages %%}{%% if loop.first and messages[0]['role'] != 'system' %%}"
    "{{ '<|im_start|>system\\n%s<|im_end|>\\n' }}{%% endif %%}"
    "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{%% endfor %%}"
    "{%% if add_generation_prompt %%}{{ '<|im_start|>assistant\\n' }}{%% endif %%}"
)
QWEN_2 = _CHATML % "You are a helpful assistant."
SMOLLM_2 = _CHATML % "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    + _ALTERNATE
    + "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
PUBLISHED = {"Llama-2": LLAMA_2, "Llama-3": LLAMA_3, "Qwen2": QWEN_2, "SmolLM2": SMOLLM_2, "Mistral": MISTRAL}


def _replaced(template: str, old: str, new: str) -> str:
    assert template.count(old) == 1
    return template.replace(old, new)


_MESSAGE = "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}"
_MARKED_MESSAGE = (
    "{% if message['role'] == 'assistant' %}{{'<|im_start|>assistant\\n'}}{% generation %}"
    "{{ message['content'] + '<|im_end|>' + '\\n'}}{% endgeneration %}{% else %}" + _MESSAGE + "{% endif %}"
)
_ANSWER_2 = "{{ ' '  + content.strip() + ' ' + eos_token }}"
_ANSWER_MISTRAL = "{{ message['content'] + eos_token}}"
MARKED = {
    "Llama-2": _replaced(LLAMA_2, _ANSWER_2, "{% generation %}" + _ANSWER_2 + "{% endgeneration %}"),
    "Llama-3": _replaced(
        LLAMA_3,
        "{{ content }}",
        "{% if message['role'] == 'assistant' %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
        "{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
        "{% else %}{{ content }}{% endif %}",
    ),
    "Qwen2": _replaced(QWEN_2, _MESSAGE, _MARKED_MESSAGE),
    "SmolLM2": _replaced(SMOLLM_2, _MESSAGE, _MARKED_MESSAGE),
    "Mistral": _replaced(MISTRAL, _ANSWER_MISTRAL, "{% generation %}" + _ANSWER_MISTRAL + "{% endgeneration %}"),
}
