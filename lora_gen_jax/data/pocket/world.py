"""A small world of things: the facts behind the embedded tasks.

In: the tables below, written for this project. Out: `ATTRIBUTES`: for each attribute, what it says of which things.
Several attributes hold of every thing ("owl": owlet, hoot, barn, bird, feathers, owls, O, animal), so that a query
alone says nothing about the task; the system prompt does.
"""

import dataclasses

from lora_gen_jax.data.pocket.requests import phrases_and_questions


@dataclasses.dataclass(frozen=True, eq=False)
class Attribute:
    """A relation between a thing and a word.

    Attributes:
        name: short name, part of a task's name.
        values: from thing to word.
        phrases: ways to say what is asked for, to follow "give"; the more of them, the more prompts are understood.
        questions: the same as whole questions.
    """

    name: str
    values: dict[str, str]
    phrases: tuple[str, ...]
    questions: tuple[str, ...]


ANIMALS = """
owl       owls       owlet    hoot     barn      parliament bird      feathers mice
cat       cats       kitten   meow     house     clowder    mammal    fur      milk
dog       dogs       puppy    bark     kennel    pack       mammal    fur      bones
cow       cows       calf     moo      farm      herd       mammal    hair     grass
horse     horses     foal     neigh    stable    team       mammal    hair     oats
sheep     sheep      lamb     bleat    fold      flock      mammal    wool     clover
pig       pigs       piglet   oink     sty       drift      mammal    bristles scraps
duck      ducks      duckling quack    pond      raft       bird      feathers weeds
goose     geese      gosling  honk     lake      gaggle     bird      feathers grass
hen       hens       chick    cluck    coop      brood      bird      feathers corn
frog      frogs      tadpole  croak    swamp     army       amphibian skin     flies
bee       bees       larva    buzz     hive      swarm      insect    fuzz     nectar
bear      bears      cub      growl    cave      sleuth     mammal    fur      honey
lion      lions      cub      roar     savanna   pride      mammal    fur      zebras
wolf      wolves     pup      howl     den       pack       mammal    fur      deer
fox       foxes      kit      yelp     burrow    skulk      mammal    fur      rabbits
mouse     mice       pinky    squeak   hole      nest       mammal    fur      cheese
eagle     eagles     eaglet   scream   cliff     aerie      bird      feathers fish
snake     snakes     snakelet hiss     pit       knot       reptile   scales   eggs
elephant  elephants  calf     trumpet  plain     parade     mammal    skin     leaves
whale     whales     calf     song     ocean     pod        mammal    blubber  krill
crow      crows      chick    caw      tree      murder     bird      feathers seeds
donkey    donkeys    foal     bray     paddock   drove      mammal    hair     hay
monkey    monkeys    infant   chatter  jungle    troop      mammal    fur      fruit
"""
COUNTRIES = """
France    Paris     Europe  French     euro     crepes
Japan     Tokyo     Asia    Japanese   yen      sushi
Italy     Rome      Europe  Italian    euro     pizza
Spain     Madrid    Europe  Spanish    euro     paella
Germany   Berlin    Europe  German     euro     sausages
Poland    Warsaw    Europe  Polish     zloty    dumplings
Greece    Athens    Europe  Greek      euro     moussaka
Russia    Moscow    Europe  Russian    ruble    borscht
China     Beijing   Asia    Mandarin   yuan     noodles
India     Delhi     Asia    Hindi      rupee    curry
Korea     Seoul     Asia    Korean     won      kimchi
Vietnam   Hanoi     Asia    Vietnamese dong     pho
Egypt     Cairo     Africa  Arabic     pound    koshari
Kenya     Nairobi   Africa  Swahili    shilling ugali
Morocco   Rabat     Africa  Arabic     dirham   couscous
Ghana     Accra     Africa  English    cedi     fufu
Brazil    Brasilia  America Portuguese real     feijoada
Canada    Ottawa    America English    dollar   poutine
Peru      Lima      America Spanish    sol      ceviche
Sweden    Stockholm Europe  Swedish    krona    meatballs
"""
FOODS = """
apple      apples       red    sweet  fruit     orchard pie
banana     bananas      yellow sweet  fruit     grove   smoothie
lemon      lemons       yellow sour   fruit     grove   juice
cherry     cherries     red    sweet  fruit     orchard jam
grape      grapes       purple sweet  fruit     vine    wine
peach      peaches      orange sweet  fruit     orchard cobbler
olive      olives       green  salty  fruit     grove   oil
coconut    coconuts     brown  mild   nut       palm    cream
walnut     walnuts      brown  bitter nut       orchard brownie
almond     almonds      beige  mild   nut       orchard marzipan
carrot     carrots      orange sweet  root      soil    cake
radish     radishes     pink   sharp  root      soil    salad
beet       beets        purple earthy root      soil    soup
potato     potatoes     beige  earthy tuber     field   chips
onion      onions       white  sharp  bulb      field   rings
tomato     tomatoes     red    tangy  berry     vine    ketchup
pumpkin    pumpkins     orange mild   squash    patch   pie
cucumber   cucumbers    green  fresh  squash    vine    pickle
pepper     peppers      green  sharp  berry     field   salsa
mushroom   mushrooms    brown  earthy fungus    log     sauce
"""
TOOLS = """
hammer      hammers      pound   carpenter  nail     workshop
saw         saws         cut     lumberjack wood     mill
needle      needles      sew     tailor     cloth    basket
broom       brooms       sweep   janitor    floor    closet
spoon       spoons       stir    cook       stew     kitchen
brush       brushes      paint   artist     canvas   studio
shovel      shovels      dig     gardener   earth    shed
axe         axes         chop    woodsman   trunk    cabin
pen         pens         write   author     paper    desk
knife       knives       slice   butcher    meat     counter
ladder      ladders      climb   roofer     wall     garage
wrench      wrenches     tighten plumber    pipe     van
drill       drills       bore    builder    concrete site
rake        rakes        gather  groundsman foliage  park
camera      cameras      shoot   reporter   scene    bag
telescope   telescopes   observe astronomer star     tower
anvil       anvils       shape   smith      iron     forge
net         nets         catch   fisher     salmon   boat
loom        looms        weave   weaver     yarn     attic
plough      ploughs      till    farmer     acre     barnyard
"""


def _table(text: str) -> list[list[str]]:
    return [line.split() for line in text.strip().splitlines()]


def _column(rows: list[list[str]], index: int) -> dict[str, str]:
    return {row[0]: row[index] for row in rows}


_ANIMALS, _COUNTRIES, _FOODS, _TOOLS = map(_table, (ANIMALS, COUNTRIES, FOODS, TOOLS))
_KINDS = {"animal": _ANIMALS, "country": _COUNTRIES, "food": _FOODS, "tool": _TOOLS}
THINGS = tuple(row[0] for table in _KINDS.values() for row in table)
# The columns of each table by name; the first is the thing itself.
_COLUMNS = (
    (_ANIMALS, ("plural", "young", "sound", "home", "group", "class", "covering", "diet")),
    (_COUNTRIES, ("capital", "continent", "language", "currency", "dish")),
    (_FOODS, ("plural", "colour", "taste", "type", "origin", "recipe")),
    (_TOOLS, ("plural", "use", "worker", "target", "storage")),
)


def _values() -> dict[str, dict[str, str]]:
    """What each attribute says of which things."""
    values: dict[str, dict[str, str]] = {}
    for table, names in _COLUMNS:
        for index, name in enumerate(names, start=1):
            values.setdefault(name, {}).update(_column(table, index))
    values["kind"] = {row[0]: kind for kind, table in _KINDS.items() for row in table}
    values["initial"] = {thing: thing[0].upper() for thing in THINGS}
    return values


_VALUES = _values()
ATTRIBUTES = tuple(Attribute(name, _VALUES[name], *asked) for name, asked in phrases_and_questions().items())
