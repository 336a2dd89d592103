"""Small chat templates, each modelled on a public one: what a model directory may bring.

They keep what makes each of them different: where the system text goes, what is stripped, dropped
or refused, how tools and reasoning are written, and what stands behind an answer.
"""

from typing import NamedTuple


class Kind(NamedTuple):
    template: str | dict[str, str]
    end: str | None  # the control token behind an answer
    tokens: tuple[str, ...] = ()  # control tokens that the tokenizer needs for it
    has_system: bool = True
    has_tools: bool = False
    has_reasoning: bool = False
    is_stable: bool = True  # a longer conversation begins as a shorter one


_IM = ("<|im_start|>", "<|im_end|>")
_CHATML_TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN2 = (
    "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
) + _CHATML_TURNS

LLAMA3 = (
    "{% for m in messages %}{% set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>"
    "\n\n' + m['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set text = bos_token + text %}{% endif %}{{ text }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA3_2 = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\n"
    "Today Date: {{ strftime_now('%d %b %Y') }}\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% endif %}<|eot_id|>"
    "{% for m in messages if m.role != 'system' or m is not sameas messages[0] %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.last and system_message is defined %}
            {{- '[INST] ' + system_message + '\\n\\n' + message['content'] + '[/INST]' }}
        {%- else %}
            {{- '[INST] ' + message['content'] + '[/INST]' }}
        {%- endif %}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
"""
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
QWEN3 = (
    "{% set head = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% if tools %}<|im_start|>system\n{{ head + '\n\n' if head else '' }}# Tools\n\n<tools>"
    "{% for t in tools %}{{ '\n' }}{{ t | tojson }}{% endfor %}{{ '\n' }}</tools><|im_end|>\n"
    "{% elif messages[0].role == 'system' %}<|im_start|>system\n{{ head }}<|im_end|>\n{% endif %}"
    "{% set last = namespace(user=messages | length - 1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}"
    "{% endif %}{% endfor %}"
    "{% for m in messages %}{% set text = m.content if m.content is string else '' %}"
    "{% if m.role == 'user' or (m.role == 'system' and not loop.first) %}"
    "<|im_start|>{{ m.role }}\n{{ text }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}"
    "{% set thought = m.reasoning_content if m.reasoning_content is string else '' %}"
    "{% if m.reasoning_content is not string and '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1] %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>assistant\n"
    "{% if loop.index0 > last.user and (loop.last or thought) %}"
    "<think>\n{{ thought.strip('\n') }}\n</think>\n\n{{ text.lstrip('\n') }}"
    "{% else %}{{ text }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{% set call = c.function or c %}"
    "{{ '\n' if text or not loop.first else '' }}"
    '<tool_call>\n{"name": "{{ call.name }}", "arguments": '
    "{{ call.arguments if call.arguments is string else call.arguments | tojson }}"
    "{{ '}' }}\n</tool_call>{% endfor %}<|im_end|>\n"
    "{% elif m.role == 'tool' %}"
    "{% if loop.first or loop.previtem.role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n' }}<tool_response>\n{{ text }}\n</tool_response>"
    "{% if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>{{ '\n' }}{% endif %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
_QWEN3_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n"
QWEN3_THINKING = QWEN3.replace(_QWEN3_PROMPT, f"{_QWEN3_PROMPT}<think>\n")
# The generation prompt has closed the block already, as where thinking is switched off.
QWEN3_CLOSED = QWEN3.replace(_QWEN3_PROMPT, f"{_QWEN3_PROMPT}<think>\n\n</think>\n\n")
DEEPSEEK_R1 = (
    "{{ bos_token }}{% for m in messages if m.role == 'system' %}"
    "{% if loop.last %}{{ m.content }}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
    "{% elif m.role == 'assistant' and m.content is not none %}"
    "<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>{{ '\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages if m.role in ('user', 'system', 'assistant') %}"
    "<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SYSTEM_LAST = (
    "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% for m in messages if m.role == 'system' %}<|system|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# gpt-oss: reasoning has a channel and a turn of its own, and the last answer another end.
CHANNELS = (
    "<|start|>system<|message|>Current date: {{ strftime_now('%Y-%m-%d') }}<|end|>"
    "{% if tools %}<|start|>developer<|message|>{{ tools | tojson }}<|end|>{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.thinking and (loop.last or m.tool_calls) %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "{% if m.tool_calls %}{% set call = m.tool_calls[0].function %}"
    "<|start|>assistant to=functions.{{ call.name }}<|channel|>commentary json<|message|>"
    "{{ call.arguments | tojson }}<|call|>{% else %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endif %}"
    "{% elif m.role == 'tool' %}<|start|>functions to=assistant<|channel|>commentary<|message|>"
    "{{ m.content | tojson }}<|end|>"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
# Content must be a list of parts, as for models that also see.
PARTS_ONLY = (
    "{% for m in messages %}<|{{ m.role }}|>{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# No control token ends an answer, and the marker is ordinary text.
PLAIN_TEXT = (
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n[end]\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
NAMED = {
    "default": QWEN2,
    "tool_use": (
        "{% if tools %}<|im_start|>tools{% for t in tools %}\n{{ t | tojson }}{% endfor %}"
        "<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} "
        "{{ c.function.arguments | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}
REFUSING = "{{ raise_exception('no chat with this model') }}"

_HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_CHANNELS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>")
_R1 = ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>")
KINDS = {
    "qwen2": Kind(QWEN2, "<|im_end|>", _IM),
    "llama3": Kind(LLAMA3, "<|eot_id|>", _HEADERS),
    "llama3.2": Kind(LLAMA3_2, "<|eot_id|>", _HEADERS),
    "mistral": Kind(MISTRAL, "<|endoftext|>", ("[INST]", "[/INST]"), is_stable=False),
    "gemma": Kind(GEMMA, "<end_of_turn>", ("<start_of_turn>", "<end_of_turn>"), has_system=False),
    "qwen3": Kind(QWEN3, "<|im_end|>", _IM, has_tools=True, has_reasoning=True, is_stable=False),
    "qwen3 thinking": Kind(
        QWEN3_THINKING, "<|im_end|>", _IM, has_tools=True, has_reasoning=True, is_stable=False
    ),
    "qwen3 closed": Kind(QWEN3_CLOSED, "<|im_end|>", _IM, has_tools=True, is_stable=False),
    "channels": Kind(CHANNELS, "<|return|>", _CHANNELS, has_tools=True, is_stable=False),
    "deepseek r1": Kind(
        DEEPSEEK_R1, "<｜end▁of▁sentence｜>", _R1, has_reasoning=True, is_stable=False
    ),
    "zephyr": Kind(ZEPHYR, "<|endoftext|>"),
    "system last": Kind(SYSTEM_LAST, "<|endoftext|>", is_stable=False),
    "plain text": Kind(PLAIN_TEXT, None),
    "named": Kind(NAMED, "<|im_end|>", _IM, has_tools=True),
}
