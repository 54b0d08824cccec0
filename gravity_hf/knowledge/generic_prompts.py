"""Everyday prompts that ask for no fact of any bank: what embeddings are centred and whitened by.

They are of many kinds, so that what all text has in common can be told from what one text says.
"""

from __future__ import annotations

GENERIC_PROMPTS: tuple[str, ...] = (
    "Could you help me plan a quiet weekend with my family?",
    "Please rewrite this paragraph so that it sounds friendlier:",
    "I have been feeling tired lately, and I think that",
    "Write a short poem about the first snow of the year.",
    "The meeting was moved to Thursday because",
    "What should I cook tonight with rice, beans and two onions?",
    "Once upon a time, in a village by the sea, there lived",
    "My neighbour's dog barks every morning, so I decided to",
    "Summarise the following e-mail in two sentences.",
    "How do I tell my manager that I need more time?",
    "She opened the old box and found",
    "The train was late again, which meant that we",
    "Give me three ideas for a birthday present.",
    "I would like to learn to play the guitar, but",
    "Translate the next sentence into plain words.",
    "Is it better to walk or to take the bus when",
    "The best part of the film was the scene where",
    "Explain to a child why it is good to share.",
    "After the match the players went to",
    "Dear Sir or Madam, I am writing to complain about",
    "Let us think step by step about the problem.",
    "The recipe says to wait until the dough",
    "What do you think about painting the kitchen blue?",
    "He put on his coat, closed the door and",
    "Make a list of things to pack for a trip to the mountains.",
    "The garden looks empty in winter, although",
    "Tell me a joke about a teacher and a cat.",
    "I lost my keys somewhere between the shop and",
    "In my opinion, the most important thing in a friendship is",
    "The instructions were long, and nobody had read",
    "How can I sleep better when it is hot outside?",
    "Our customers say that the new design is",
    "Correct the spelling of the text below.",
    "It had rained for days when the visitors finally",
    "Which of these two titles sounds better?",
    "The children were playing outside while",
    "My plan for next month is to save money by",
    "Thank you for your message. Unfortunately,",
    "What would be a good name for a small bakery?",
    "They argued for an hour about whether",
)
