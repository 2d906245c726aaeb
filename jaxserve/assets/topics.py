"""What the little model talks about: nouns that occur in its books, by kind."""

TOPICS: dict[str, tuple[str, ...]] = {
    "animal": (
        "bear", "bird", "cat", "cow", "dog", "fish", "fox", "frog", "horse", "jackal", "lamb", "lion", "mouse",
        "nightingale", "owl", "pig", "pigeon", "rabbit", "sheep", "tiger", "trout", "turtle", "whale", "wolf",
    ),
    "person": (
        "baby", "boy", "captain", "carpenter", "cook", "doctor", "emperor", "farmer", "father", "girl", "grandmother",
        "judge", "king", "lady", "maid", "mother", "old man", "old woman", "prince", "princess", "queen", "sailor",
        "servant", "shepherd", "sister", "soldier", "tailor", "teacher", "thief", "uncle",
    ),
    "place": (
        "castle", "chimney", "church", "city", "court", "farm", "field", "forest", "garden", "hill", "house", "island",
        "kitchen", "market", "mountain", "palace", "river", "road", "school", "sea", "shop", "stable", "town",
        "village", "wood",
    ),
    "thing": (
        "basket", "bed", "bell", "boat", "book", "box", "bread", "cake", "candle", "chair", "clock", "coat", "crown",
        "door", "fire", "glass", "gold", "hat", "key", "lamp", "letter", "picture", "purse", "ring", "ship", "shoes",
        "song", "sword", "table", "treasure", "watch", "window",
    ),
    "nature": (
        "apple", "cloud", "evening", "flower", "grass", "ice", "leaf", "light", "moon", "morning", "night", "rain",
        "rose", "shadow", "sky", "snow", "star", "stone", "storm", "summer", "sun", "tree", "water", "wind", "winter",
    ),
}  # fmt: skip

KIND = {topic: kind for kind, topics in TOPICS.items() for topic in topics}
