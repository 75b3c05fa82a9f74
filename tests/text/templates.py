"""Chat templates in the formats of well-known model families, with their peculiarities.

Each is written for these tests after the format of the family. They differ in which messages are
stripped, whether there is a default system message, whether a system message is refused or merged
into the user turn, what ends a turn, and which features of the template language are used.
"""

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "qwen 2.5, default system message": (
        "{%- if messages[0].role != 'system' %}"
        "{{- '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{%- endif %}"
        "{%- if tools is not none %}{{- 'tools' }}{%- endif %}" + CHATML
    ),
    "qwen 3, thinking": (
        "{%- set ns = namespace(last=0) %}"
        "{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}"
        "{%- endif %}{%- endfor %}"
        "{%- for m in messages %}{%- if m.role != 'assistant' %}"
        "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{%- else %}{%- set content = m.content.split('</think>')[-1].lstrip('\n') %}"
        "{{- '<|im_start|>assistant\n' }}"
        "{%- if loop.index0 > ns.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
        "{{- content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
        "{%- if enable_thinking is defined and enable_thinking is false %}"
        "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
    ),
    "llama 2": (
        "{% if messages[0].role == 'system' %}"
        "{% set rest = messages[1:] %}{% set system = messages[0].content %}"
        "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}"
        "{% for m in rest %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate') }}{% endif %}"
        "{% if loop.index0 == 0 and system != false %}"
        "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m.content %}"
        "{% else %}{% set content = m.content %}{% endif %}"
        "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama 3": (
        "{% set loop_messages = messages %}{% for m in loop_messages %}"
        "{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n'"
        " + m['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
        "{{ content }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "llama 3.1, dates": (
        "{{- bos_token }}{%- if not date is defined %}{%- set date = strftime_now('%Y') %}"
        "{%- endif %}{%- if messages[0]['role'] == 'system' %}"
        "{%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}"
        "{%- else %}{%- set system = '' %}{%- endif %}"
        "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}"
        "{{- 'Today: ' + date + '\n\n' }}{{- system }}{{- '<|eot_id|>' }}"
        "{%- for m in messages %}"
        "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim }}"
        "{{- '<|eot_id|>' }}{%- endfor %}{%- if add_generation_prompt %}"
        "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
    ),
    "mistral, system message in the last user message": (
        "{%- set ns = namespace(system='') %}{{- bos_token }}"
        "{%- for m in messages %}{%- if m.role == 'system' %}{%- set ns.system = m.content %}"
        "{%- elif m.role == 'user' %}"
        "{{- '[INST] ' + (ns.system + '\n\n' if loop.last and ns.system else '') }}"
        "{{- m.content + '[/INST]' }}"
        "{%- else %}{{- ' ' + m.content | trim + eos_token }}{%- endif %}{%- endfor %}"
    ),
    "gemma, no system message": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate') }}{% endif %}"
        "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "phi 3, another end of the conversation": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
        "{% else %}{{ eos_token }}{% endif %}"
    ),
    "zephyr, lines between blocks": """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n' + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    "vicuna": (
        "{% for m in messages %}"
        "{% if m.role == 'system' %}{{ m.content + ' ' }}"
        "{% elif m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
        "{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    ),
    "alpaca": (
        "{% for m in messages %}"
        "{% if m.role == 'system' %}{{ m.content.rstrip() + '\n\n' }}"
        "{% elif m.role == 'user' %}{{ '### Instruction:\n' + m.content.lstrip() + '\n\n' }}"
        "{% else %}{{ '### Response:\n' + m.content + eos_token + '\n\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
    ),
    "deepseek r1, opens a thought": (
        "{% set ns = namespace(system='') %}{%- for m in messages %}"
        "{%- if m.role == 'system' %}{% set ns.system = m.content %}{%- endif %}{%- endfor %}"
        "{{ bos_token }}{{ ns.system }}{%- for m in messages %}"
        "{%- if m.role == 'user' %}{{ '<|User|>' + m.content }}{%- endif %}"
        "{%- if m.role == 'assistant' %}{% set content = m.content %}"
        "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}"
        "{% endif %}{{ '<|Assistant|>' + content + eos_token }}{%- endif %}{%- endfor %}"
        "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
    ),
    "command-r, macro": (
        "{{ bos_token }}{% macro turn(role, text) %}"
        "{{ '<|START_OF_TURN_TOKEN|><|' + role + '_TOKEN|>' + text + '<|END_OF_TURN_TOKEN|>' }}"
        "{% endmacro %}{% for m in messages %}"
        "{{ turn({'user': 'USER', 'system': 'SYSTEM', 'assistant': 'CHATBOT'}[m.role],"
        " m.content.strip()) }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
    ),
    "falcon, a turn has no end": (
        "{% for m in messages %}{% if not loop.first %}{{ '\n\n' }}{% endif %}"
        "{{ {'user': 'User: ', 'system': 'System: ', 'assistant': 'Falcon: '}[m.role] }}"
        "{{ m.content.strip() }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n\nFalcon:' }}{% endif %}"
    ),
    "openchat, loop controls": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'tool' %}{% continue %}{% endif %}"
        "{% if loop.index0 > 99 %}{% break %}{% endif %}"
        "{{ 'GPT4 Correct ' + m.role.title() + ': ' + m.content + '<|end_of_turn|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'GPT4 Correct Assistant:' }}{% endif %}"
    ),
    "smollm 3, generation tag": (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{{ '<|im_start|>assistant\n' }}{% generation %}{{ m.content + '<|im_end|>' }}"
        "{% endgeneration %}{{ '\n' }}{% else %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content.strip('\n') + '<|im_end|>\n' }}"
        "{% endif %}{% endfor %}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
    ),
}
