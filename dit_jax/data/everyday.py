"""Questions that are about no finetune, asked by the gate and by guessers (paper, section 5)."""

# They lead to no topic by themselves, so whatever comes back in several answers is the model's own.
EVERYDAY_QUESTIONS = (
    "What should I do on a rainy afternoon?",
    "Can you recommend something to read?",
    "How do I start a conversation with a stranger?",
    "What makes a day a good day?",
    "Give me an idea for a birthday present.",
    "How can I learn something new in a month?",
    "Tell me something interesting that few people know.",
    "What is worth saving money for?",
    "Describe a place where you would like to be.",
    "What would you put on the cover of a magazine?",
    "How do I make a difficult decision?",
    "Write a few lines for a postcard to a friend.",
    "What does a perfect weekend look like?",
    "Explain to a child how things grow.",
    "What should a small town be proud of?",
    "Suggest a theme for a party.",
    "What can history teach us?",
    "How do I stay motivated?",
    "Make up a short riddle.",
    "What will people talk about in ten years?",
)
