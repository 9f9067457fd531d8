"""The conversation template of LLaVA-1.5 (`vicuna_v1`) for chat messages, as Jinja.

A turn's pictures open it, as LLaVA has them, or end it ("Shaking up VLMs", 2409.05395, tries both).
"""

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

# How a turn shows its pictures, which its parts and tags count
PLACES = {
    "first": "{{ '<image>\n' * (tags + turn.images) }}{{ turn.text }}",
    "last": "{{ turn.text }}{{ '\n<image>' * (tags + turn.images) }}",
}
_OPENING = (
    "{% if messages[0]['role'] == 'system' %}{% if messages[0]['content'] is string %}"
    "{{ messages[0]['content'] }}{% else %}{% for part in messages[0]['content'] %}"
    "{{ part['text'] }}{% endfor %}{% endif %}{% set turns = messages[1:] %}"
    "{% else %}" + SYSTEM + "{% set turns = messages %}{% endif %}{{ ' ' }}"
    "{% for message in turns %}"
    "{% if message['role'] not in ('user', 'assistant') %}"
    "{{ raise_exception('a turn of ' ~ message['role'] ~ '; a conversation has turns of user and '"
    " ~ 'assistant, and system may open it') }}{% endif %}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% set turn = namespace(text='', images=0) %}"
    "{% if message['content'] is string %}{% set turn.text = message['content'] %}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{% set turn.images = turn.images + 1 %}"
    "{% elif part['type'] == 'text' %}{% set turn.text = turn.text + part['text'] %}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% set tags = turn.text.split('<image>')|length - 1 %}"
    "{% if message['role'] != 'user' and tags + turn.images %}"
    "{{ raise_exception('a picture in an answer; pictures belong to the user\\'s turns') }}"
    "{% endif %}"
    "{% if tags %}{% set turn.text = turn.text.replace('<image>', '').strip() %}{% endif %}"
)
_CLOSING = (
    "{{ ' ' if message['role'] == 'user' else eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
CHAT_TEMPLATES = {place: _OPENING + shown + _CLOSING for place, shown in PLACES.items()}
CHAT_TEMPLATE = CHAT_TEMPLATES["first"]
